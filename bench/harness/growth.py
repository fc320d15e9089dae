"""How time and memory grow: the exponent p of size^p, fitted by least squares to the logarithms."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bench.harness.contest import Sweep
from bench.harness.measure import Clock, memory_of, prepare, seconds_of


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The slope of log(value) over log(size); None from fewer than three points or where a value is not positive."""
    if len(sizes) < 3 or min(values) <= 0:
        return None
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


def grow(
    sweep: Sweep, device: torch.device, rounds: int = 3, memory: bool = True, clock: Clock = "wall"
) -> dict[str, Any]:
    """The measured points of every contender, and the exponents of its time and extra memory."""
    points: dict[str, list[dict[str, float]]] = {name: [] for name in sweep.contenders}
    for size in sweep.sizes:
        contest = sweep.contest(size)
        runs, _ = prepare(contest)
        runs = {
            name: run
            for name, run in runs.items()
            if name in sweep.contenders and size <= (sweep.most or {}).get(name, size)
        }
        for name, samples in seconds_of(runs, rounds, device, clock).items():
            point = {"size": size, "seconds": statistics.median(samples)}
            if contest.memory and memory:
                point |= memory_of(contest, name, runs[name], device)
            points[name].append(point)
    exponents = {}
    for name, found in points.items():
        exponents[name] = {
            "time": exponent([x["size"] for x in found], [x["seconds"] for x in found]),
            "extra": exponent([x["size"] for x in found if "extra" in x], [x["extra"] for x in found if "extra" in x]),
        }
    return {
        "name": sweep.name,
        "axis": sweep.axis,
        "sizes": list(sweep.sizes),
        "points": points,
        "exponents": exponents,
    }
