"""Trains a CoCa on one task: how a task teacher is made of imported or pre-trained weights before it is distilled."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from optima.coca import CoCa
from optima.coca.checkpoint import load_coca, save_coca
from optima.data.config import HELD, DataConfig
from optima.memory import peak_mib
from optima.run_directory import RunDirectory
from optima.task import Task
from optima.tasks.choose import open_data
from optima.tasks.data import TaskData, head_spec
from optima.tasks.evaluate import evaluate
from optima.tasks.fit import refuse_misfit, refuse_unscorable
from optima.tasks.forward import TaskForward
from optima.training import train
from optima.words import write_words
from optima_core.config import OptimiserConfig, Precision


@dataclass(frozen=True)
class FinetuneConfig:
    """How a CoCa is trained on a task.

    Attributes:
        model: Weights to start from (.safetensors), such as `import` writes. A head that the task needs and they lack
            is added, with random weights.
        task: What the model is to learn.
        data: Which pictures and texts.
        run: Run directory, new or empty; see also resume. At the end it holds model.safetensors.
        steps: Optimiser steps.
        batch_size: Items a step.
        optimiser: AdamW and its schedule over all steps.
        precision: Arithmetic of the forward pass; weights and optimiser stay fp32.
        compile: Compile the three modules with torch.compile; needs a C++ compiler on a CPU.
        stored: Floating-point type of the weights in model.safetensors.
        evaluate_every: Steps between points of the learning curve; 0 draws none.
        evaluate_items: Validation items a point of the learning curve.
        evaluate_batch: Items a forward pass of an evaluation.
        test_items: Test items that the final scores are measured on; 0 takes all.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between progress lines.
        seed: Seed of a new head and of the data stream.
        threads: CPU threads; 0 takes what torch chooses.
        resume: Continue from the newest checkpoint of the run directory.
    """

    model: Path
    task: Task = "captioning"
    data: DataConfig = field(default_factory=DataConfig)
    run: Path = Path("runs/finetune")
    steps: int = 2000
    batch_size: int = 32
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(learning_rate=1e-4))
    precision: Precision = "bf16"
    compile: bool = False
    stored: Literal["fp32", "fp16"] = "fp32"
    evaluate_every: int = 500
    evaluate_items: int = 250
    evaluate_batch: int = 250
    test_items: int = 0
    checkpoint_every: int = 200
    log_every: int = 50
    seed: int = 0
    threads: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_items", "evaluate_batch", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "test_items", "seed", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def finetune(config: FinetuneConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains the model, writes model.safetensors and words.json, and returns what summary.json holds."""
    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = load_coca(config.model)
    data = open_data(
        config.data, config.task, start.config, seed=config.seed, device=device, report=config.run / "rejected.jsonl"
    )
    with contextlib.closing(data):
        return _finetune(config, start, data, device, say, started)


def _finetune(
    config: FinetuneConfig,
    start: CoCa,
    data: TaskData,
    device: torch.device,
    say: Callable[[str], None],
    started: float,
) -> dict[str, Any]:
    for split in HELD:
        refuse_unscorable(data, split)
    model = with_head(start, f"model {config.model}", data, config.seed).to(device)
    forward = TaskForward(model, config.task)
    directory = RunDirectory(config.run, resume=config.resume, keep=2)

    def losses(step: int) -> dict[str, Tensor]:
        return {config.task: forward(data.training_batch(step, config.batch_size), {}).task_loss}

    def after_step(step: int) -> None:
        if config.evaluate_every and step % config.evaluate_every == 0:
            scores = evaluate(
                model, data, "validation", limit=config.evaluate_items, batch_size=config.evaluate_batch
            ).scores
            say(f"step {step}: validation {data.headline} {scores[data.headline]:.1f}")

    train(model, config.steps, losses, config, directory, say, after_step)
    save_coca(model, config.run / "model.safetensors", torch.float16 if config.stored == "fp16" else torch.float32)
    write_words(directory, data)
    evaluation = evaluate(model, data, "test", limit=config.test_items, batch_size=config.evaluate_batch)
    summary = {
        "task": config.task,
        "scores": evaluation.scores,
        "headline_metric": data.headline,
        "test_items": len(evaluation.predictions),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.monotonic() - started,
        "peak_mib": peak_mib(),
    }
    directory.write_json("summary.json", summary)
    return summary


def with_head(model: CoCa, name: str, data: TaskData, seed: int) -> CoCa:
    """The model, and if it lacks the head that the task wants, the same weights with a fresh one.

    Raises OptimaError, calling the model `name`, if it cannot be run on the data or its head is for other classes.
    """
    refuse_misfit(model, name, data)
    head = head_spec(data)
    if head is None or data.task in model.head_specs:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown = CoCa(model.config, model.head_specs | {data.task: head})
    grown.load_state_dict(grown.state_dict() | model.state_dict())
    return grown


def run_finetune(config: FinetuneConfig) -> None:
    """Trains, then prints the scores."""
    summary = finetune(config, lambda line: print(line, flush=True))
    for name, value in summary["scores"].items():
        print(f"test {name} {value:.1f}")
    print(f"wrote {config.run / 'model.safetensors'}")
