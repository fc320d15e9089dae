"""Equality, time and memory of a contest's contenders.

Time: the contenders take turns in one process, so that a busy moment of the machine hits them alike; the median counts.
Memory on a CPU: a fresh process a contender, which runs once (what libraries allocate at their first call is no cost of
the work), gives freed memory back to the system, and runs again: extra memory is how far its resident memory rose above
where it stood, results included, and the peak is that of the whole process, weights and libraries included. On a GPU
torch's allocator tells both.

The clock "cpu" counts the process's CPU seconds, on all its threads, in place of the wall's: where others use the
machine.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.harness.contest import Contest, Run, Unavailable

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
Clock = Literal["wall", "cpu"]
LEAST_SECONDS = 0.02  # a sample shorter than this repeats its work


def prepare(contest: Contest) -> tuple[dict[str, Run], dict[str, str]]:
    """The runs of the contenders that are there and equal to the first, and why the others are not."""
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    expected: list[Tensor] | None = None
    for name, make in contest.contenders.items():
        try:
            run = make()
            if name not in contest.unequal:
                actual = [x.detach().clone() for x in run()]
                expected = expected or actual
                error = difference(actual, expected)
                if not error <= contest.tolerance:
                    raise Unavailable(f"another result than {next(iter(contest.contenders))}: off by {error:.1e}")
            runs[name] = run
        except Unavailable as reason:
            notes[name] = str(reason)
        except Exception as failure:  # the others are measured all the same, and the table says what happened
            notes[name] = f"failed: {type(failure).__name__}: {str(failure).strip().splitlines()[0][:200]}"
    return runs, notes


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of a tensor, in the Euclidean norm."""
    return max(
        float((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30))
        for a, e in zip(actual, expected, strict=True)
    )


def failed(note: str) -> bool:
    """Whether it tells of a contender that is there and does not do its work, ours or another."""
    return note.startswith(("failed", "another result"))


def seconds_of(
    runs: Mapping[str, Run], rounds: int, device: torch.device, clock: Clock = "wall"
) -> dict[str, list[float]]:
    """Seconds of every sample of every run."""
    first = {name: _sample(run, 1, device, clock) for name, run in runs.items()}
    repeats = {name: max(1, round(LEAST_SECONDS / max(seconds, 1e-6))) for name, seconds in first.items()}
    seconds: dict[str, list[float]] = {name: [x] if repeats[name] == 1 else [] for name, x in first.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            if len(seconds[name]) < rounds:
                seconds[name].append(_sample(run, repeats[name], device, clock))
    return seconds


def _sample(run: Run, repeats: int, device: torch.device, clock: Clock) -> float:
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    _finish(device)
    start = now()
    for _ in range(repeats):
        run()
    _finish(device)
    return (now() - start) / repeats


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(contest: Contest, name: str, run: Run, device: torch.device) -> dict[str, float]:
    """Extra and peak memory in MiB: {"extra": ..., "peak": ...}; empty where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        peak = torch.cuda.max_memory_allocated(device)
        return {"extra": (peak - before) / 2**20, "peak": peak / 2**20}
    if not Path("/proc/self/clear_refs").exists():
        return {}
    command = [sys.executable, "-m", "bench", "--measure-memory", json.dumps([contest.suite, contest.name, name])]
    done = subprocess.run(
        [*command, "--threads", str(torch.get_num_threads())], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"memory of {name} in {contest.name}: {done.stderr.strip()[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def own_memory(run: Run) -> dict[str, float]:
    """What `memory_of` asks a fresh process for."""
    run()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return {"extra": peak - before, "peak": peak}


def _status(field: str) -> float:
    """A field of /proc/self/status, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def measure(
    contest: Contest,
    device: torch.device,
    rounds: int | None = None,
    memory: bool = True,
    clock: Clock = "wall",
) -> dict[str, Any]:
    """Everything about a contest, as JSON: seconds (median, all samples), memory, ratios to the first, bars."""
    runs, notes = prepare(contest)
    rows: dict[str, dict[str, Any]] = {name: {"note": note} for name, note in notes.items()}
    if runs:
        for name, samples in seconds_of(runs, rounds or contest.rounds, device, clock).items():
            rows[name] = {"seconds": statistics.median(samples), "samples": samples}
            if contest.memory and memory:
                rows[name] |= memory_of(contest, name, runs[name], device)
    first = rows.get(next(iter(contest.contenders)), {})
    for row in rows.values():
        row["ratios"] = {
            ratio: row[field] / first[field]
            for ratio, field in (("time", "seconds"), ("extra", "extra"), ("peak", "peak"))
            if field in row and first.get(field)
        }
    rates = {}
    if contest.work is not None and "seconds" in rows.get("optima", {}):
        seconds = rows["optima"]["seconds"]
        rates = {name: amount / seconds / 1e9 for name, amount in contest.work._asdict().items()}
    bars = []
    for bar in contest.bars if device.type == "cpu" else ():
        field = "seconds" if bar.quantity == "time" else bar.quantity
        found = [rows.get(name, {}).get(field) for name in (bar.contender, bar.against)]
        reached = None if None in found else found[0] / found[1]
        bars.append(bar._asdict() | {"reached": reached})
    return {
        "name": contest.name,
        "rows": {name: rows[name] for name in contest.contenders},
        "unequal": list(contest.unequal),
        "bars": bars,
        "rates": rates,
    }
