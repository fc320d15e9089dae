"""The command `evaluate`: a model's scores on held-out data, and its predictions in the benchmark's format."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from optima.coca import CoCa
from optima.coca.checkpoint import load_coca
from optima.coca.config import GenerationConfig
from optima.data.config import DataConfig, Held
from optima.data.records import FORMATS
from optima.task import TASKS, Task
from optima.tasks.choose import open_data
from optima.tasks.evaluate import evaluate
from optima.tasks.fit import refuse_headless, refuse_misfit
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores a model on a held-out split.

    Attributes:
        model: Weights (.safetensors), such as a run directory's student.safetensors.
        tasks: Tasks to score; those that the model has no head for are refused. None named takes the task of the data,
            and of pictograms all that the model has heads for, and captioning.
        data: Which pictures and texts.
        split: Which held-out split; data.validation and data.test say which one of the data set that is.
        items: Items of the split that count; 0 takes all.
        batch_size: Items a forward pass.
        generation: How captions are generated.
        predictions: Folder to write predictions to, in the benchmark's submission format; null writes none.
    """

    model: Path
    tasks: list[Task] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    split: Held = "test"
    items: int = 0
    batch_size: int = 250
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    predictions: Path | None = None

    def __post_init__(self) -> None:
        if self.items < 0 or self.batch_size < 1:
            raise ValueError(
                f"items must be at least 0 and batch_size at least 1, got {self.items} and {self.batch_size}"
            )


def run_evaluate(config: EvaluateConfig) -> None:
    """Prints a model's scores, and writes its predictions if asked to."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_coca(config.model).to(device)
    for task in config.tasks or _own_tasks(config, model):
        _evaluate_task(config, model, task, device, Console())


def _own_tasks(config: EvaluateConfig, model: CoCa) -> list[Task]:
    if config.data.name != "pictograms":
        return [FORMATS[config.data.name].task]
    return [task for task in TASKS if task == "captioning" or task in model.head_specs]


def _evaluate_task(config: EvaluateConfig, model: CoCa, task: Task, device: torch.device, console: Console) -> None:
    report = config.predictions / "rejected.jsonl" if config.predictions is not None else None
    data = open_data(config.data, task, model.config, device=device, report=report)
    with contextlib.closing(data):
        refuse_misfit(model, f"model {config.model}", data)
        refuse_headless(model, f"model {config.model}", data)
        if config.predictions is None and not data.has_truth(config.split):
            raise OptimaError(
                f"the {config.split} split of {data.name} has no published truth to score by; "
                "give --predictions FOLDER to write predictions, or another split"
            )
        if config.predictions is not None:
            config.predictions.mkdir(parents=True, exist_ok=True)
        found = evaluate(
            model, data, config.split, limit=config.items, batch_size=config.batch_size, generation=config.generation
        )
        if found.scores:
            table = Table("score, %", task, header_style="bold")
            for name, value in found.scores.items():
                table.add_row(name, f"{value:.1f}")
            console.print(table)
        if unused := data.unused(config.split):
            print(f"{len(found.indices):,} items count; {unused:,} that cannot be used are left out")
        if config.predictions is not None:
            name, content = data.submission(config.split, found.indices, found.predictions)
            write_atomically(config.predictions / name, content.encode())
            console.print(f"wrote {config.predictions / name}", highlight=False, soft_wrap=True)
