"""Everything worth running on a rented GPU, in one command and under eight minutes.

    python bench/run_on_gpu.py [--minutes 8]

1. the kernels' self-check; 2. the tests marked gpu; 3. each loss forward and backward in bfloat16, ours beside eager
torch and eager torch compiled, checked equal first: median time, peak memory, and how near the time is to the floor
that the work itself sets; 4. the losses behind a closed gate, and the time per shape. What the time no longer allows is
left out and named. Results go to bench/results/<device>-<date>.json, written after every part, so that a machine that
goes away leaves what it had.

`--rehearse` runs the same code on a CPU with tiny shapes and writes nothing: a proof of the script, not of speed.
"""

import argparse
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from optima_kernels import attention_map_losses, hidden_mses, linear_kl, selfcheck

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TOLERANCE = 5e-2  # of bfloat16 gradients, relative


class Case(NamedTuple):
    """A loss at a shape: `run(backend)` gives the loss and its gradients.

    `flops` and `exps` are what the definition asks for, `bytes` each input read and each gradient written once.
    """

    name: str
    shape: dict[str, int]
    run: Callable[[Any, str, Tensor | None], list[Tensor]]
    loss: Callable[..., Any]
    gates: int
    flops: float
    exps: float
    bytes: float


def attention_case(device: torch.device, kind: str, layers: int, batch: int, heads: int, tokens: int, d: int) -> Case:
    """Maps of `layers` layers, students and teachers of equal shape."""
    names = ("q_s", "k_s", "q_t", "k_t")
    tensors = {name: [_normal(device, batch, heads, tokens, d) for _ in range(layers)] for name in names}
    students = _trained(*tensors["q_s"], *tensors["k_s"])

    def run(loss: Any, backend: str, gate: Tensor | None) -> list[Tensor]:
        return _with_gradients(loss(**tensors, kind=kind, gate=gate, backend=backend).sum(), students)

    elements = layers * batch * heads * tokens**2
    shape = {"layers": layers, "batch": batch, "heads": heads, "tokens": tokens, "d": d}
    size = 2 * layers * batch * heads * tokens * d
    # Two products of scores and two of gradients; each element of both maps once.
    return Case(
        f"attention {kind}", shape, run, attention_map_losses, layers, 8 * elements * d, 2 * elements, 2 * size * 3
    )


def hidden_case(device: torch.device, normalize: str | None, layers: int, tokens: int, d_s: int, d_t: int) -> Case:
    h_s = _trained(*(_normal(device, tokens, d_s) for _ in range(layers)))
    h_t = [_normal(device, tokens, d_t) for _ in range(layers)]
    weight = _trained(*(_normal(device, d_t, d_s) * d_s**-0.5 for _ in range(layers)))

    def run(loss: Any, backend: str, gate: Tensor | None) -> list[Tensor]:
        value = loss(h_s, h_t, weight, normalize=normalize, gate=gate, backend=backend).sum()
        return _with_gradients(value, [*h_s, *weight])

    shape = {"layers": layers, "tokens": tokens, "d_s": d_s, "d_t": d_t}
    size = layers * (2 * tokens * d_s + tokens * d_t + 2 * d_t * d_s)
    flops = 6.0 * layers * tokens * d_s * d_t
    return Case(f"hidden {normalize or 'plain'}", shape, run, hidden_mses, layers, flops, 0, 2 * size)


def vocabulary_case(device: torch.device, divergence: str, tokens: int, size: int, d_s: int, d_t: int) -> Case:
    h_s, w_s = _trained(_normal(device, tokens, d_s), _normal(device, size, d_s) * d_s**-0.5)
    h_t, w_t = _normal(device, tokens, d_t), _normal(device, size, d_t) * d_t**-0.5

    def run(loss: Any, backend: str, gate: Tensor | None) -> list[Tensor]:
        gate = None if gate is None else gate[0]
        value = loss(h_s, w_s, h_t, w_t, divergence=divergence, temperature=2.0, gate=gate, backend=backend)
        return _with_gradients(value, [h_s, w_s])

    shape = {"tokens": tokens, "vocabulary": size, "d_s": d_s, "d_t": d_t}
    flops = 2.0 * tokens * size * (3 * d_s + d_t)
    moved = 2 * (2 * (tokens + size) * d_s + (tokens + size) * d_t)
    return Case(f"vocabulary {divergence}", shape, run, linear_kl, 1, flops, 2.0 * tokens * size, moved)


def cases(device: torch.device, rehearse: bool) -> Iterator[Case]:
    """In order of value."""
    if rehearse:
        yield attention_case(device, "kl", 2, 1, 2, 20, 16)
        yield hidden_case(device, "layernorm", 2, 30, 16, 24)
        yield vocabulary_case(device, "forward", 20, 100, 16, 24)
        return
    yield attention_case(device, "kl", 6, 8, 12, 577, 64)
    yield hidden_case(device, "layernorm", 6, 8 * 577, 768, 1024)
    yield vocabulary_case(device, "forward", 4096, 49408, 768, 1024)
    yield attention_case(device, "mse", 6, 8, 12, 577, 64)
    yield hidden_case(device, None, 6, 8 * 577, 768, 1024)
    yield vocabulary_case(device, "jsd", 4096, 49408, 768, 1024)
    for tokens in (197, 1024, 2048, 4096):
        yield attention_case(device, "kl", 1, 8, 12, tokens, 64)
    yield attention_case(device, "kl", 6, 8, 8, 577, 128)
    for size in (32000, 128256, 256000):
        yield vocabulary_case(device, "forward", 2048, size, 768, 1024)


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16)


def _trained(*tensors: Tensor) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def _with_gradients(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, of)]


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Median time and extra memory of every contender, each first checked equal to eager torch."""
    ours = "triton" if device.type == "cuda" else "blocked"
    torch.compiler.reset()
    compiled = torch.compile(case.loss, dynamic=False)
    contenders: dict[str, Callable[[], list[Tensor]]] = {
        "ours": lambda: case.run(case.loss, ours, None),
        "eager": lambda: case.run(case.loss, "reference", None),
        "compiled": lambda: case.run(compiled, "reference", None),
        "blocked": lambda: case.run(case.loss, "blocked", None),
    }
    found: dict[str, Any] = {"case": case.name, **case.shape, "floor": {}}
    expected: list[Tensor] | None = None
    for name in ("eager", "ours", "compiled", "blocked"):
        try:
            actual = contenders[name]()
            expected = expected or actual
            error = max(_difference(a, e) for a, e in zip(actual, expected, strict=True))
            del actual
            if not error < TOLERANCE:
                found[name] = {"error": error, "note": "differs from eager, not timed"}
                continue
            found[name] = {"error": error, **_time(contenders[name], device, seconds)}
        except Exception as failure:  # on a rented machine the other contenders and cases still count
            found[name] = {"note": f"{type(failure).__name__}: {str(failure)[:300]}"}
            torch.cuda.empty_cache()
    del expected
    if "ms" in found["ours"]:
        closed = torch.zeros(case.gates, device=device)
        found["closed gate"] = _time(lambda: case.run(case.loss, ours, closed), device, seconds)
        per_second = 1e3 / found["ours"]["ms"]
        found["floor"] = {
            "tflops": case.flops * per_second / 1e12,
            "gexps": case.exps * per_second / 1e9,
            "gbytes": case.bytes * per_second / 1e9,
        }
    return found


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def _time(run: Callable[[], Any], device: torch.device, seconds: float) -> dict[str, float]:
    run()
    memory = {}
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        memory = {"extra_mib": (torch.cuda.max_memory_allocated(device) - before) / 2**20}
    timed = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()).blocked_autorange(
        min_run_time=seconds
    )
    return {"ms": timed.median * 1e3, "iqr_ms": timed.iqr * 1e3, **memory}


def run_tests(minutes: float) -> dict[str, Any]:
    """The tests marked gpu, in a process of their own; they must not outlast `minutes`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", "tests/gpu"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes, check=False)
    except subprocess.TimeoutExpired as expired:
        return {"outcome": f"stopped after {minutes:.1f} minutes", "tail": str(expired.stdout or "")[-2000:]}
    lines = done.stdout.strip().splitlines()
    return {
        "outcome": lines[-1] if lines else done.stderr[-2000:],
        "failed": [x for x in lines if x.startswith("FAILED")],
    }


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    import triton

    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return about


def print_case(found: dict[str, Any]) -> None:
    """One line a contender."""
    shape = " ".join(f"{name}={x}" for name, x in found.items() if isinstance(x, int))
    print(f"{found['case']} ({shape})")
    for name in ("ours", "eager", "compiled", "blocked", "closed gate"):
        row = found.get(name, {"note": "not timed"})
        if "ms" not in row:
            print(f"    {name:12} {row['note']}")
            continue
        ratio = row["ms"] / found["ours"].get("ms", math.nan)
        memory = f"{row['extra_mib']:9.1f} MiB" if "extra_mib" in row else ""
        print(f"    {name:12} {row['ms']:9.3f} ms  {ratio:6.2f} of ours {memory}")
    if found["floor"]:
        print("    ours runs at {tflops:.1f} TFLOP/s, {gexps:.0f} Gexp/s, {gbytes:.0f} GB/s".format(**found["floor"]))
    sys.stdout.flush()


def main() -> int:
    """Returns 1 if a self-check, a test or an equality failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU; writes nothing")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.rehearse):
        print(
            "torch finds no CUDA device, so there is nothing to measure; --rehearse tries the script", file=sys.stderr
        )
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    report: dict[str, Any] = {"about": describe(device), "selfcheck": [], "tests": {}, "cases": [], "left out": []}
    name = f"{re.sub('[^a-z0-9]+', '-', report['about']['device'].lower())}-{report['about']['date'][:10]}.json"

    def keep() -> None:
        if not options.rehearse:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / name).write_text(json.dumps(report, indent=1) + "\n")

    print(json.dumps(report["about"], indent=1))
    if not options.rehearse:
        for loss in selfcheck.PROBLEMS:
            outcome = selfcheck.check_anew(loss, device)
            report["selfcheck"].append({"loss": loss, "passed": outcome.passed, "error": outcome.error})
            print(f"self-check of {loss}: {'right' if outcome.passed else outcome.detail}", flush=True)
    keep()
    # The first six cases matter more than the last tests: tests get half of the time.
    report["tests"] = {} if options.rehearse else run_tests(options.minutes / 2)
    print("tests:", report["tests"].get("outcome", "not in a rehearsal"), flush=True)
    keep()
    longest = 0.0
    for case in cases(device, options.rehearse):
        started = time.monotonic()
        if started + longest > deadline:
            report["left out"].append({"case": case.name, **case.shape})
            continue
        found = measure(case, device, 0.02 if options.rehearse else 0.3)
        longest = max(longest, time.monotonic() - started)
        report["cases"].append(found)
        print_case(found)
        keep()
    for left in report["left out"]:
        print(f"left out for lack of time: {left}")
    if not options.rehearse:
        print(f"wrote {RESULTS / name}")
    right = all(outcome["passed"] for outcome in report["selfcheck"]) and not report["tests"].get("failed")
    return 0 if right and all("ms" in found["ours"] for found in report["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
