"""Runs of one seed side by side: each batch is drawn, and shown to the teacher, once for all of them.

`optima compare` makes every run a process of its own, as a person would; this takes a third less time, with the same
engine and options. Torch has one thread, and the runs take turns in a round, so that each one's time can be told.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import torch

from bench.balances import Weighing
from bench.worlds import WORLDS, words
from optima.assets import TEACHER
from optima.coca import MODULES, CoCa
from optima.coca.checkpoint import load_coca
from optima.coca.pairs import module_pairs
from optima.commands.parse import parse
from optima.runs.config import DistillConfig
from optima.runs.start import make_start
from optima.task import Task
from optima.tasks.batches import TaskBatch
from optima.tasks.choose import open_data
from optima.tasks.data import TaskData
from optima.tasks.evaluate import evaluate
from optima.tasks.forward import TaskForward
from optima_core import Distiller, Forward, RoundRecord
from optima_core.taps import WantedTaps


class Lockstep:
    """A task and a seed: data, teacher and start, and the runs on them.

    settings: what `add_arguments` adds, and `options`: words of `optima distill` that hold for every run.
    """

    def __init__(self, task: str, seed: int, settings: argparse.Namespace) -> None:
        self.task, self.seed, self.settings = task, seed, settings
        torch.set_num_threads(1)
        with TemporaryDirectory() as folder:
            config = self.config(words(settings.world, Path(folder)))
            torch.manual_seed(seed)
            self.teacher = load_coca(config.teacher or TEACHER).requires_grad_(False)
            self.data = open_data(config.data, config.task, self.teacher.config, seed=seed)
            self.start = make_start(config, self.teacher, self.data)
        self.once = _Once(self.data, self.teacher, config.batch_size)
        self.probe = self.data.probe_batch(config.probe_size)
        self.rounds = 0
        self.seconds: dict[int, float] = {}

    def config(self, own: Sequence[str]) -> DistillConfig:
        """That of a run with these options."""
        settings = self.settings
        sizes = ["--engine.rounds", str(settings.rounds), "--engine.steps_per_round", str(settings.steps)]
        shared = ["--task", self.task, "--seed", str(self.seed), *sizes, *settings.options]
        _, config = parse(["distill", *shared, *own])
        assert isinstance(config, DistillConfig)
        return config

    def distiller(self, own: Sequence[str], weighing: type[Weighing] = Weighing) -> Distiller[TaskBatch]:
        """A run with these options, at the start. A weighing of its own, if it is to have one, needs no balance."""
        config = self.config(own)
        student = copy.deepcopy(self.start).train()
        torch.manual_seed(config.seed)
        pairs = module_pairs(student, self.teacher, config.layer_map, config.single_layer_maps)
        teach = weighing.shown(self.once.teach, self.probe, self.once.wanted)
        forward = TaskForward(student, config.task)
        found = Distiller(student, forward, teach, pairs, self.once.load, self.probe, config.engine, config.seed)
        if weighing is not Weighing:
            found.objective.total = weighing(found.objective, config.engine.steps_per_round).total  # type: ignore[method-assign]
        return found

    def run_round(self, distillers: Sequence[Distiller[TaskBatch]]) -> list[RoundRecord]:
        """The next round of all of them, on the same batches."""
        self.once.draw(self.rounds * self.settings.steps, self.settings.steps)
        self.rounds += 1
        records = []
        for distiller in distillers:
            began = time.perf_counter()
            records.append(distiller.run_round())
            self.seconds[id(distiller)] = self.seconds.get(id(distiller), 0.0) + time.perf_counter() - began
        return records

    def seconds_of(self, distiller: Distiller[TaskBatch]) -> float:
        """What its rounds have taken, without the teacher's share."""
        return self.seconds[id(distiller)]

    def score(self, distiller: Distiller[TaskBatch]) -> float:
        """Of the first items of the split, in %."""
        student = distiller.result
        assert isinstance(student, CoCa)
        found = evaluate(student, self.data, self.settings.split, limit=self.settings.items)
        return found.scores[self.data.headline]


class _Once:
    """Batches, and what the teacher shows of them, kept while all runs go through a round."""

    def __init__(self, data: TaskData, teacher: CoCa, size: int) -> None:
        self.data, self.size = data, size
        self.forward = TaskForward(teacher, data.task)
        self.wanted: WantedTaps = {name: tuple(range(getattr(teacher.config, name).layers)) for name in MODULES}
        self.batches: dict[int, TaskBatch] = {}
        self.shown: dict[int, tuple[TaskBatch, Forward]] = {}

    def load(self, step: int) -> TaskBatch:
        if step not in self.batches:
            self.batches[step] = self.data.training_batch(step, self.size)
        return self.batches[step]

    def teach(self, batch: TaskBatch, wanted: WantedTaps) -> Forward:
        kept = self.shown.get(id(batch.tokens))
        if kept is None:
            kept = self.shown[id(batch.tokens)] = (batch, self.forward(batch, self.wanted))
        taps = {name: tuple(kept[1].taps[name][layer] for layer in layers) for name, layers in wanted.items()}
        return kept[1]._replace(taps=taps)

    def draw(self, first: int, count: int) -> None:
        """The batches of a round, in place of those of the round before."""
        self.batches.clear()
        self.shown.clear()
        for step in range(first, first + count):
            with torch.no_grad():
                self.teach(self.load(step), {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every script in lockstep has."""
    parser.add_argument("--tasks", nargs="+", default=list(get_args(Task)))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--items", type=int, default=2000, help="of the split, that a score is of")
    parser.add_argument("--world", choices=WORLDS, default="plain")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps a round")
    parser.add_argument("--table", type=Path, help="a file of runs to print, in place of running")
