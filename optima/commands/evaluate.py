"""The command `evaluate`: a model's scores on held-out data, and its predictions in the benchmark's format."""

import contextlib
from dataclasses import replace

from optima.coca import CoCa
from optima.coca.checkpoint import load_coca
from optima.commands.console import make_console, make_table
from optima.commands.options import EvaluateConfig
from optima.data.config import DataConfig, TransformConfig
from optima.data.records import FORMATS
from optima.runs.directory import REJECTED
from optima.runs.words import refuse_other_words, words_beside
from optima.task import TASKS, Task
from optima.tasks.choose import open_data
from optima.tasks.data import Evaluation, TaskData
from optima.tasks.evaluate import evaluate
from optima.tasks.fit import refuse_headless, refuse_misfit
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError
from optima_core.parallel import Ranks, join_ranks


def run_evaluate(config: EvaluateConfig) -> None:
    """Prints a model's scores, and writes its predictions if asked to."""
    with join_ranks() as ranks:
        model = load_coca(config.model).to(ranks.device)
        for task in config.tasks or _own_tasks(config, model):
            _evaluate_task(config, model, task, ranks)


def _own_tasks(config: EvaluateConfig, model: CoCa) -> list[Task]:
    if config.data.name != "pictograms":
        return [FORMATS[config.data.name].task]
    return [task for task in TASKS if task == "captioning" or task in model.head_specs]


def _shown_as(data: DataConfig, trained: TransformConfig) -> DataConfig:
    """The data with images fitted to squares as those were that the model was trained on."""
    transform = replace(data.loader.transform, fit=trained.fit, interpolation=trained.interpolation)
    return replace(data, loader=replace(data.loader, transform=transform))


def _evaluate_task(config: EvaluateConfig, model: CoCa, task: Task, ranks: Ranks) -> None:
    report = config.predictions / REJECTED if config.predictions is not None else None
    trained = words_beside(config.model)
    words, chosen = None, config.data
    if trained is not None:
        words, chosen = (trained.tokenizer, trained.text_length), _shown_as(chosen, trained.transform)
    data = open_data(
        chosen,
        task,
        model.config,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.count,
        report=report,
        words=words,
    )
    with contextlib.closing(data):
        refuse_other_words(config.model, data)
        refuse_misfit(model, f"model {config.model}", data)
        refuse_headless(model, f"model {config.model}", data)
        if config.predictions is None and not data.has_truth(config.split):
            raise OptimaError(
                f"the {config.split} split of {data.name} has no published truth to score by; "
                "give --predictions FOLDER to write predictions, or another split"
            )
        if config.predictions is not None:
            config.predictions.mkdir(parents=True, exist_ok=True)
        read = data.unused(config.split)
        found = evaluate(
            model,
            data,
            config.split,
            limit=config.items,
            batch_size=config.batch_size,
            generation=config.generation,
            ranks=ranks,
        )
        unused = read + sum(ranks.gather(data.unused(config.split) - read))
        if ranks.first:
            _tell(config, data, found, unused)


def _tell(config: EvaluateConfig, data: TaskData, found: Evaluation, unused: int) -> None:
    console = make_console()
    if found.scores:
        table = make_table("score, %", data.task, left=2)
        for name, value in found.scores.items():
            table.add_row(name, f"{value:.1f}")
        console.print(table)
    if unused:
        print(f"{len(found.indices):,} items count; {unused:,} that cannot be used are left out")
    if config.predictions is not None:
        name, content = data.submission(config.split, found.indices, found.predictions)
        write_atomically(config.predictions / name, content.encode())
        console.print(f"wrote {config.predictions / name}", soft_wrap=True)
