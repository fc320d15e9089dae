"""Everything worth running on a rented GPU, in one command and under eight minutes.

    python bench/run_on_gpu.py [--minutes 8]

1. the kernels' self-check; 2. the tests marked gpu; 3. the contests of `python -m bench` in bfloat16, the most telling
first: each loss beside eager and compiled torch and its peers, the whole step, the losses behind a closed gate. What
the time no longer allows is left out and named. Results go to bench/results/<device>/ and bench/RESULTS.md after every
part, so that a machine that goes away leaves what it had.

`--rehearse` runs the same code on a CPU with tiny shapes and writes nothing: a proof of the script, not of speed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import attention, hidden, logits, report, whole_step  # noqa: E402
from bench.contest import Contest  # noqa: E402
from bench.measure import failed, measure  # noqa: E402
from bench.suites import SUITES  # noqa: E402
from optima_kernels.shared import selfcheck  # noqa: E402


def contests(device: torch.device, rehearse: bool) -> Iterator[Contest]:
    """The suites' contests, the first of each before the second of any."""
    if rehearse:
        sizes = whole_step.Sizes((4, 32, 4), (2, 24, 3), image=32, batch=2, classes=8, relation_heads=2)
        yield attention.contest(device, "kl", 2, 1, 2, 20, 16, peers=False)
        yield hidden.contest(device, "layernorm", 2, 30, 16, 24, peers=False)
        yield logits.linear(device, "forward", 20, 100, 16, 24, peers=False)
        yield whole_step.contests(device, sizes)[0]
        return
    suites = [suite.contests(device) for suite in SUITES.values()]
    for place in range(max(map(len, suites))):
        yield from (found[place] for found in suites if place < len(found))


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


def check(device: torch.device, minutes: float) -> dict[str, Any]:
    """The self-check of every loss, and the tests."""
    outcomes = []
    for loss in selfcheck.PROBLEMS:
        outcome = selfcheck.check_anew(loss, device)
        outcomes.append({"loss": loss, "passed": outcome.passed, "error": outcome.error})
        print(f"self-check of {loss}: {'right' if outcome.passed else outcome.detail}", flush=True)
    # The first contests matter more than the last tests: tests get half of the time.
    tests = run_tests(minutes / 2)
    print("tests:", tests["outcome"], flush=True)
    return {"selfcheck": outcomes, "tests": tests}


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
    about = report.describe(device) | {"clock": "wall"}
    print(json.dumps(about, indent=1))
    right = True
    if not options.rehearse:
        checks = check(device, options.minutes)
        right = all(outcome["passed"] for outcome in checks["selfcheck"]) and not checks["tests"].get("failed")
        path = report.write("checks", about, [], [])
        path.write_text(json.dumps({"about": about, **checks}, indent=1) + "\n")
    found: dict[str, list[Any]] = {}
    longest = 0.0
    for contest in contests(device, options.rehearse):
        started = time.monotonic()
        if started + longest > deadline:
            print(f"left out for lack of time: {contest.suite}: {contest.name}")
            continue
        measured = measure(contest, device, memory=not options.rehearse)
        longest = max(longest, time.monotonic() - started)
        right &= not any(failed(row.get("note", "")) for row in measured["rows"].values())
        for row in report.rows_of(measured):
            print(" | ".join(row), flush=True)
        found.setdefault(contest.suite, []).append(measured)
        if not options.rehearse:
            report.write(contest.suite, about, found[contest.suite], [])
            (ROOT / "bench" / "RESULTS.md").write_text(report.markdown())
        torch.cuda.empty_cache()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
