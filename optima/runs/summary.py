"""What a distillation came to: its scores beside its teacher's, its cost, and what it depended on."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optima import __version__
from optima.coca import CoCa
from optima.runs.rows import LayerWork, Model, Round
from optima.tasks.data import Evaluation, TaskData
from optima.tasks.evaluate import evaluate
from optima_core.parallel import Ranks

TIMED = 250
"""Most items that speed is measured on."""
PASSES = 3
"""Passes over the same items that each model's speed is the median of: one is as good as the machine's other work."""


def score_models(
    models: Mapping[Model, CoCa],
    data: TaskData,
    items: int,
    batch_size: int,
    say: Callable[[str], None],
    ranks: Ranks | None = None,
) -> dict[Model, Evaluation]:
    """Evaluates the models on the test split (`items` of it, 0 is all), on all ranks together.

    say: shows a line as soon as a model is scored.
    """
    found: dict[Model, Evaluation] = {}
    for name, model in models.items():
        found[name] = evaluate(model, data, "test", limit=items, batch_size=batch_size, ranks=ranks)
        say(f"{name}: {data.headline} {found[name].scores[data.headline]:.1f}")
    return found


def measure_speed(models: Mapping[Model, CoCa], data: TaskData, items: int, batch_size: int) -> dict[Model, float]:
    """Items a second of each model on the first test items, `items` of them or `TIMED`, on this process alone.

    The models take turns, so that what disturbs one disturbs all.
    """
    found: dict[Model, list[float]] = {name: [] for name in models}
    for _ in range(PASSES):
        for name, model in models.items():
            begun = time.monotonic()
            said = evaluate(model, data, "test", limit=min(items or TIMED, TIMED), batch_size=batch_size).predictions
            found[name].append(len(said) / (time.monotonic() - begun))
    return {name: statistics.median(speeds) for name, speeds in found.items()}


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
