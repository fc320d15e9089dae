"""Ways of choosing what to distil, from the same start at equal steps, in lockstep: `python -m bench.choosing`.

`optima compare` runs every way as a process of its own, as a person would. This draws each batch, and runs the teacher
on it, once for all of them, which takes a third less time; the engine and its options are the same. Each run is a line
of a file, written when it has ended, and is not repeated. `python -m bench.choosing --table FILE` prints the table.
Other options are those of `optima distill`, and hold for every method.
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from optima.assets import TEACHER
from optima.coca import CoCa
from optima.coca.checkpoint import load_coca
from optima.coca.pairs import module_pairs
from optima.commands.compare import METHODS, method_options
from optima.commands.parse import parse
from optima.report.comparison import Outcome, markdown
from optima.runs.config import DistillConfig
from optima.runs.rows import plain
from optima.runs.start import make_start
from optima.task import TASKS
from optima.tasks.batches import TaskBatch
from optima.tasks.choose import open_data
from optima.tasks.data import TaskData
from optima.tasks.evaluate import evaluate
from optima.tasks.forward import TaskForward
from optima_core import Distiller, Forward, RoundRecord
from optima_core.taps import WantedTaps


class _Once:
    """Batches, and what the teacher shows of them, kept while all methods go through a round."""

    def __init__(self, data: TaskData, teacher: CoCa, size: int) -> None:
        self.data, self.size = data, size
        self.forward = TaskForward(teacher, data.task)
        self.wanted: WantedTaps = {
            "image_encoder": tuple(range(teacher.config.image_encoder.layers)),
            "text_decoder": tuple(range(teacher.config.text_decoder.layers)),
            "multimodal_decoder": tuple(range(teacher.config.multimodal_decoder.layers)),
        }
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


def run(task: str, seed: int, methods: Sequence[str], settings: argparse.Namespace) -> None:
    """Distils by each method, and writes each one's line."""
    config = _config(task, seed, "optima", settings)
    torch.manual_seed(seed)
    teacher = load_coca(TEACHER).requires_grad_(False)
    data = open_data(
        config.data,
        config.task,
        teacher.config,
        seed=seed,
        device=torch.device("cpu"),
        rank=0,
        world_size=1,
        report=Path("unused"),
    )
    start = make_start(config, teacher, data)
    once = _Once(data, teacher, config.batch_size)
    probe = data.probe_batch(config.probe_size)
    configs = {method: _config(task, seed, method, settings) for method in methods}
    running = {method: _distiller(found, start, teacher, once, probe) for method, found in configs.items()}
    seconds = dict.fromkeys(running, 0.0)
    records: dict[str, list[RoundRecord]] = {method: [] for method in running}
    for number in range(settings.rounds):
        once.draw(number * settings.steps, settings.steps)
        for method, distiller in running.items():
            began = time.perf_counter()
            records[method].append(distiller.run_round())
            seconds[method] += time.perf_counter() - began
    for method, distiller in running.items():
        score = evaluate(distiller.result, data, settings.split, limit=2000, batch_size=250).scores[data.headline]
        row = {
            "task": task,
            "seed": seed,
            "method": method,
            "score": score,
            "seconds": seconds[method],
            "split": settings.split,
            "options": settings.options,
            "rounds": [plain(record) for record in records[method]],
        }
        with open(settings.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{task}  seed {seed}  {method}: {score:.2f} % in {seconds[method]:.0f} s", flush=True)


def _config(task: str, seed: int, method: str, settings: argparse.Namespace) -> DistillConfig:
    words = ["--task", task, "--seed", str(seed), "--engine.rounds", str(settings.rounds), "--engine.steps_per_round"]
    _, config = parse(["distill", *words, str(settings.steps), *settings.options, *method_options(method)])
    assert isinstance(config, DistillConfig)
    return config


def _distiller(
    config: DistillConfig, start: CoCa, teacher: CoCa, once: _Once, probe: TaskBatch
) -> Distiller[TaskBatch]:
    student = copy.deepcopy(start).train()
    torch.manual_seed(config.seed)
    pairs = module_pairs(student, teacher, config.layer_map, config.single_layer_maps)
    return Distiller(
        student, TaskForward(student, config.task), once.teach, pairs, once.load, probe, config.engine, config.seed
    )


def table(path: Path, reference: str) -> str:
    """The runs of a file as Markdown."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return markdown(
        [Outcome(row["task"], row["method"], row["seed"], row["score"], row["seconds"], 0.0) for row in rows], reference
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps a round")
    parser.add_argument("--out", type=Path, default=Path("choosing.jsonl"))
    parser.add_argument("--table", type=Path, help="a file of runs to print, in place of running")
    settings, settings.options = parser.parse_known_args()
    if settings.table:
        print(table(settings.table, "optima"))
        return
    torch.set_num_threads(1)
    done = set()
    if settings.out.exists():
        rows = map(json.loads, settings.out.read_text(encoding="utf-8").splitlines())
        done = {(row["task"], row["seed"], row["method"]) for row in rows}
    for seed in settings.seeds:
        for task in settings.tasks:
            methods = [method for method in settings.methods if (task, seed, method) not in done]
            if methods:
                run(task, seed, methods, settings)


if __name__ == "__main__":
    main()
