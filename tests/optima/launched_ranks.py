"""The main job under torchrun, with gloo: its processes, its rows and its lines."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def start(options: list[str], ranks: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    """Starts `optima` with these options under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*launcher, "--max-restarts", str(restarts), "-m", "--", "optima.run", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that are whole."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_rounds(run: Path, rounds: int, process: subprocess.Popen[str]) -> None:
    """Returns when so many rounds are done; fails the test if the run ends before, or they do not come."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if len(rows_of(run)) >= rounds:
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no {rounds} rounds came: {process.communicate()}")


def rank_process(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:  # it has just ended
            continue
    pytest.fail(f"there is no rank {rank}")


def told(errors: str) -> list[str]:
    """Our lines, without what torchrun says of the processes it started."""
    return [line for line in errors.splitlines() if line.startswith("optima:")]
