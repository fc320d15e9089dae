"""Ways of choosing what to distil, from the same start at equal steps, in lockstep: `python -m bench.choosing`.

`optima compare` runs every way as a process of its own, as a person would. This draws each batch, and runs the teacher
on it, once for all of them, which takes a third less time; the engine and its options are the same. Each run is a line
of a file, written when it has ended, and is not repeated. `python -m bench.choosing --table FILE` prints the table.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optima.assets import TEACHER
from optima.coca import MODULES, CoCa
from optima.coca.checkpoint import load_coca
from optima.coca.pairs import module_pairs
from optima.report.comparison import Outcome, conclusion, markdown, method_rows
from optima.runs.config import DistillConfig
from optima.runs.start import make_start
from optima.task import TASKS
from optima.tasks.batches import TaskBatch
from optima.tasks.choose import open_data
from optima.tasks.data import TaskData
from optima.tasks.evaluate import evaluate
from optima.tasks.forward import TaskForward
from optima_core import BanditConfig, Distiller, DistillerConfig, Forward, ObjectiveConfig
from optima_core.taps import WantedTaps

ALL = BanditConfig("all_modules")
_SUBSET = {name: (1 << place) for place, name in enumerate(MODULES)}


def _subset(*modules: str) -> BanditConfig:
    arm = sum(_SUBSET[name] for name in modules) - 1
    return BanditConfig("fixed_arm", arms="subsets", options={"arm": arm})


def _at(weight: float) -> dict[str, Any]:
    return {"balance": "none", "objective": ObjectiveConfig(hidden=weight, attention=weight)}


IMAGE_AND_MULTIMODAL = _subset("image_encoder", "multimodal_decoder")
METHODS: dict[str, dict[str, Any]] = {
    "optima": {},
    "all, balanced": {"bandit": ALL},
    **{f"all @{weight}": {"bandit": ALL, **_at(weight)} for weight in (1, 3, 10, 30, 100)},
    "image + multimodal, balanced": {"bandit": IMAGE_AND_MULTIMODAL},
    "image + multimodal @30": {"bandit": IMAGE_AND_MULTIMODAL, **_at(30)},
    "multimodal @30": {"bandit": _subset("multimodal_decoder"), **_at(30)},
    "uniform random subset": {"bandit": BanditConfig("uniform", arms="subsets")},
    "round robin": {"bandit": BanditConfig("round_robin")},
    "discounted ucb": {"bandit": BanditConfig("discounted_ucb")},
    "linear thompson": {"bandit": BanditConfig("linear_thompson")},
    "task and logits": {"bandit": ALL, **_at(0)},
}
"""Method -> the engine's options in which it differs from the defaults."""


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

    def forget(self) -> None:
        self.batches.clear()
        self.shown.clear()


def run(task: str, seed: int, methods: Mapping[str, dict[str, Any]], settings: argparse.Namespace) -> None:
    """Distils by each method, and writes each one's line."""
    engine = DistillerConfig(rounds=settings.rounds, steps_per_round=settings.steps, teacher_ahead=False)
    config = DistillConfig(task=task, seed=seed, run=Path("unused"), engine=engine, layer_map=settings.layer_map)  # type: ignore[arg-type]
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
    running = {}
    for name, options in methods.items():
        student = copy.deepcopy(start).train()
        torch.manual_seed(seed)
        running[name] = Distiller(
            student,
            TaskForward(student, config.task),
            once.teach,
            module_pairs(student, teacher, config.layer_map),
            once.load,
            probe,
            replace(engine, **options),
            seed,
        )
    seconds = dict.fromkeys(running, 0.0)
    records: dict[str, list[Any]] = {name: [] for name in running}
    for _ in range(engine.rounds):
        once.forget()
        for step in range(
            running[next(iter(running))].step, running[next(iter(running))].step + engine.steps_per_round
        ):
            batch = once.load(step)
            with torch.no_grad():
                once.teach(batch, {})
        for name, distiller in running.items():
            began = time.perf_counter()
            found = distiller.run_round()
            seconds[name] += time.perf_counter() - began
            records[name].append(
                {
                    "strengths": found.strengths,
                    "agreement": found.agreement,
                    "weights": found.weights,
                    "reward": found.reward,
                    "probe": {"task": found.probe["task"], "logits": found.probe.get("logits")},
                }
            )
    once.forget()
    for name, distiller in running.items():
        score = evaluate(distiller.result, data, settings.split, limit=2000, batch_size=250).scores[data.headline]
        row = {
            "task": task,
            "seed": seed,
            "method": name,
            "score": score,
            "seconds": seconds[name],
            "split": settings.split,
            "rounds": records[name],
        }
        with open(settings.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{task}  seed {seed}  {name}: {score:.2f} % in {seconds[name]:.0f} s", flush=True)


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
    parser.add_argument("--layer-map", type=json.loads, default="uniform", help="as --layer_map of distill, in JSON")
    parser.add_argument("--out", type=Path, default=Path("choosing.jsonl"))
    parser.add_argument("--table", type=Path, help="a file of runs to print, in place of running")
    settings = parser.parse_args()
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
            methods = {name: METHODS[name] for name in settings.methods if (task, seed, name) not in done}
            if methods:
                run(task, seed, methods, settings)


if __name__ == "__main__":
    main()
