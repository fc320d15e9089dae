"""Ways to start a student, at equal steps of distillation on the embedded captioning task.

The shipped teacher and the shipped student's sizes; engine and data as `optima distill` has them, but for the number of
steps, over which the learning rate falls to zero. Scores in % on the first items of the validation split, before and
after, mean and standard error over seeds (`--rounds`); beside them losses of the probe batch, and "objective", all of
them weighted as in training.
"""

import statistics
from collections.abc import Iterator
from typing import get_args

import torch

from bench.harness.study import Table
from optima.assets import TEACHER
from optima.coca.checkpoint import load_coca
from optima.coca.pairs import module_pairs
from optima.runs.config import DistillConfig, Initialisation
from optima.runs.start import make_start
from optima.tasks.evaluate import evaluate
from optima.tasks.forward import TaskForward
from optima.tasks.pictograms import PictogramTask
from optima_core import Distiller, DistillerConfig, LossTerm

PAGE = "INITIALISATION.md"
TITLE = "Ways to start a student"
SEEDS, STEPS, PER_ROUND, ITEMS = 3, 200, 25, 250
SCORES = ("kind_accuracy", "count_accuracy", "scene_accuracy")
Found = dict[str, list[float]]
"""Each measure before and after."""


def tables(rounds: int | None) -> Iterator[Table]:
    seeds = rounds or SEEDS
    rows = [
        [init, *cells([run(init, seed, STEPS, ITEMS) for seed in range(seeds)])] for init in get_args(Initialisation)
    ]
    header = ("start", *(f"{name}, before → after" for name in (*SCORES, "task", "logits", "objective")))
    yield Table(f"{STEPS} steps, {seeds} seeds, {ITEMS} validation items", header, rows)


def cells(found: list[Found]) -> Iterator[str]:
    """A cell a measure."""
    for name in found[0]:
        before, after = ([one[name][place] for one in found] for place in (0, 1))
        spread = statistics.stdev(after) / len(after) ** 0.5 if len(after) > 1 else 0.0
        digits = 1 if name in SCORES else 2
        yield f"{statistics.mean(before):.{digits}f} → {statistics.mean(after):.{digits}f} ± {spread:.{digits}f}"


def run(init: Initialisation, seed: int, steps: int, items: int) -> Found:
    """One distillation from one start."""
    config = DistillConfig(init=init, seed=seed, engine=DistillerConfig(rounds=steps // PER_ROUND))
    torch.manual_seed(seed)
    teacher = load_coca(TEACHER).requires_grad_(False)
    data = PictogramTask(config.task, seed, torch.device("cpu"))
    student = make_start(config, teacher, data).train()
    distiller = Distiller(
        student,
        TaskForward(student, config.task),
        TaskForward(teacher, config.task),
        module_pairs(student, teacher, config.layer_map),
        lambda step: data.training_batch(step, config.batch_size),
        data.held_batch("validation", range(config.probe_size)),
        config.engine,
        seed,
    )
    found: Found = {}

    def measure(probe: dict[str, float]) -> None:
        scores = evaluate(student, data, "validation", limit=items).scores
        for name in SCORES:
            found.setdefault(name, []).append(scores[name])
        for name in ("task", "logits"):
            found.setdefault(name, []).append(probe[name])
        weights = {name: distiller.objective.weight(LossTerm.parse(name)) for name in probe}
        found.setdefault("objective", []).append(sum(weights[name] * loss for name, loss in probe.items()))

    measure(distiller.initial_probe.named())
    while distiller.round < config.engine.rounds:
        record = distiller.run_round()
    measure(record.probe)
    return found
