"""Times on a GPU: by replay of a CUDA graph, which has no host in it, by the wall's clock, and of the host alone."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu.context import Context

Run = Callable[[], Sequence[Tensor]]
SAMPLES = 5
SAMPLE_SECONDS = 0.02


def measured(run: Run, context: Context) -> dict[str, Any]:
    """How long a call takes, in milliseconds, and how far memory rises meanwhile, in MiB.

    "graph": of a replay, None with a reason where it cannot be captured; "wall": of a call, back to back; "host": until
    a call returns; "extra_mib": at the peak, above where it stood.
    """
    if context.device.type != "cuda":
        return {"wall": _wall(run, context, 1), "graph": None, "note": "a rehearsal"}
    run()
    context.finish()
    if context.warm:
        return {"wall": torch.nan, "graph": None}
    before = torch.cuda.memory_allocated(context.device)
    torch.cuda.reset_peak_memory_stats(context.device)
    run()
    context.finish()
    found: dict[str, Any] = {"extra_mib": round((torch.cuda.max_memory_allocated(context.device) - before) / 2**20, 1)}
    once = _wall(run, context, 2)
    found["wall"] = _wall(run, context, max(3, round(1e3 * SAMPLE_SECONDS / once)))
    found["host"] = _host(run, context)
    try:
        found["graph"] = replayed(run)
    except Exception as failure:  # peers may wait for the device, which a capture forbids
        context.finish()
        found |= {"graph": None, "note": f"not captured: {' '.join(str(failure).split())[:100]}"}
    return found


def _wall(run: Run, context: Context, repeats: int) -> float:
    context.finish()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    context.finish()
    return 1e3 * (time.perf_counter() - start) / repeats


def _host(run: Run, context: Context) -> float:
    """Of few calls, so that the queue to the device is never full."""
    samples = []
    for _ in range(5):
        context.finish()
        start = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - start))
    context.finish()
    return statistics.median(samples)


def replayed(run: Run) -> float:
    """Milliseconds of a replay: the median of samples."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(repeats: int) -> float:
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / repeats

    sample(1)
    repeats = max(1, round(1e3 * SAMPLE_SECONDS / max(sample(2), 1e-3)))
    milliseconds = statistics.median(sample(repeats) for _ in range(SAMPLES))
    del kept
    return milliseconds


def by_kernel(run: Run, context: Context, most: int = 10) -> dict[str, list[float]]:
    """Microseconds and launches of each of the dearest kernels of a call, as torch's profiler has them."""
    if context.device.type != "cuda" or context.warm:
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run()
        context.finish()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:most]
    return {event.key[:48]: [round(event.self_device_time_total / 3, 1), event.count // 3] for event in events}
