"""Ways to start a student, at equal steps of distillation on the embedded captioning task: a table in Markdown.

    python bench/bench_initialise.py [--seeds 3] [--steps 200] [--items 500]

The shipped teacher and the shipped student's sizes; engine and data as `python -m optima.run distill` has them, but for
the number of steps (a learning rate that falls to zero over them). Scores on the first items of the validation split.
Beside scores: the losses of the probe batch, weighted as in training, before and after.
"""

import argparse
import statistics
import time
from typing import get_args

import torch

from optima.assets import TEACHER
from optima.coca.checkpoint import load_coca
from optima.coca.pairs import module_pairs
from optima.runs.config import DistillConfig, Initialisation
from optima.runs.start import make_start
from optima.tasks.evaluate import evaluate
from optima.tasks.forward import TaskForward
from optima.tasks.pictograms import PictogramTask
from optima_core import Distiller, DistillerConfig, LossTerm

PER_ROUND = 25


def run(init: Initialisation, seed: int, steps: int, items: int) -> dict[str, list[float]]:
    """Each measure before and after."""
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
    found: dict[str, list[float]] = {}

    def measure(probe: dict[str, float]) -> None:
        scores = evaluate(student, data, "validation", limit=items).scores
        for name in ("kind_accuracy", "count_accuracy", "scene_accuracy"):
            found.setdefault(name, []).append(scores[name])
        for name in ("task", "logits"):
            found.setdefault(name, []).append(probe[name])
        weights = {name: distiller.objective.weight(LossTerm.parse(name)) for name in probe}
        found.setdefault("total", []).append(sum(weights[name] * loss for name, loss in probe.items()))

    measure(distiller.initial_probe.named())
    while distiller.round < config.engine.rounds:
        record = distiller.run_round()
    measure(record.probe)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--items", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    runs: dict[str, list[dict[str, list[float]]]] = {init: [] for init in get_args(Initialisation)}
    for seed in range(options.seeds):
        for init, found in runs.items():
            found.append(run(init, seed, options.steps, options.items))
            print(f"seed {seed} {init} after {time.monotonic() - started:.0f} s: {found[-1]}", flush=True)
    measures = list(runs["checkpoint"][0])
    print(
        f"\n{options.steps} steps, {options.seeds} seeds, {options.items} validation items, torch {torch.__version__}\n"
    )
    print("| start | " + " | ".join(f"{name} before → after" for name in measures) + " |")
    print("|---|" + "---|" * len(measures))
    for init, found in runs.items():
        cells = []
        for name in measures:
            before, after = ([one[name][place] for one in found] for place in (0, 1))
            spread = statistics.stdev(after) / len(after) ** 0.5 if len(after) > 1 else 0.0
            digits = 1 if name.endswith("accuracy") else 2
            cells.append(
                f"{statistics.mean(before):.{digits}f} → {statistics.mean(after):.{digits}f} ± {spread:.{digits}f}"
            )
        print(f"| {init} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
