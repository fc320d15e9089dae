"""What a distillation came to: its scores beside its teacher's, its cost, and what it depended on."""

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optima import __version__
from optima.coca import CoCa
from optima.runs.rows import LayerWork, Model, Round
from optima.tasks.data import Evaluation, TaskData
from optima.tasks.evaluate import evaluate


def score_models(
    models: Mapping[Model, CoCa], data: TaskData, items: int, batch_size: int
) -> tuple[dict[Model, Evaluation], dict[Model, float]]:
    """Evaluates the models on the test split (`items` of it, 0 is all) -> the outcomes, and items a second."""
    found: dict[Model, Evaluation] = {}
    speed: dict[Model, float] = {}
    for name, model in models.items():
        begun = time.monotonic()
        found[name] = evaluate(model, data, "test", limit=items, batch_size=batch_size)
        speed[name] = len(found[name].predictions) / (time.monotonic() - begun)
    return found, speed


def layer_work(rows: Sequence[Round]) -> LayerWork:
    """What choosing modules saved in those rounds."""
    if not rows:
        return LayerWork()
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault(row.chosen, []).append(row.step_seconds)
    return LayerWork(
        statistics.fmean(row.tapped for row in rows),
        {modules: statistics.median(found) for modules, found in seconds.items()},
    )


def count_parameters(model: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run depend on beside its configuration."""
    return {
        "optima": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }
