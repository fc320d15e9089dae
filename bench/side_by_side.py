"""Time and extra memory of functions that should return the same gradients, measured in one process on a CPU."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Sequence[Tensor]]


def best_seconds(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """The best of `repeats` runs of each; runs take turns, so that a busy moment of the machine hits them alike."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def extra_megabytes(run: Run) -> float:
    """The most memory that torch's allocator had handed out at once since the call began, results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    now = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 1e6


def check_equal(runs: dict[str, Run], tolerance: float = 1e-4) -> None:
    """Every function's tensors are the first one's."""
    first, *others = runs
    expected = runs[first]()
    for name in others:
        for actual, target in zip(runs[name](), expected, strict=True):
            error = float((actual - target).norm() / target.norm())
            assert error < tolerance, f"{name} gives another result than {first}: relative error {error:.1e}"


def print_table(runs: dict[str, Run], repeats: int) -> None:
    """Time and memory of each, and their ratios to the first."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, forward + backward, best of {repeats}")
    check_equal(runs)
    seconds = best_seconds(runs, repeats)
    megabytes = {name: extra_megabytes(run) for name, run in runs.items()}
    first = next(iter(runs))
    for name in runs:
        of_time, of_memory = seconds[name] / seconds[first], megabytes[name] / megabytes[first]
        print(
            f"{name:12} {seconds[name]:8.3f} s  {of_time:6.3f}   {megabytes[name]:8.1f} MB  {of_memory:6.3f}",
            flush=True,
        )
