"""Kills random ranks of runs that torchrun's agent starts anew: KILLS SEED DIRECTORY RANKS OPTIONS...

The agent is torch's own, with `--max-restarts 3`, and starts its processes as forks of one that has imported everything
but computed nothing: what a start costs is paid once. Every run must end by itself with the student and the rows of one
that was left alone. Prints, as JSON, how many kills there were, into how many of them a checkpoint was being written,
and after which rounds the runs went on.
"""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch._dynamo
import torch.distributed.checkpoint.default_planner
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import optima.commands.distill  # noqa: F401
from optima.commands.parse import parse
from optima.run import main
from optima_core.checkpoint import MANIFEST

RESTARTS = 3
CLOCK = {"seconds", "step_seconds"}


def work(words: list[str]) -> None:
    """What a rank does."""
    status = main(words)
    if status:
        sys.stderr.flush()
        os._exit(status)


def launch(ranks: int, words: list[str], output: Path) -> int:
    """The process id of an agent, with ranks that write to the file."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stdout.fileno())
        os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed rank flushes nothing
        # The endpoint of --standalone.
        config = LaunchConfig(
            1, 1, ranks, run_id=f"run-{os.getpid()}", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            max_restarts=RESTARTS, start_method="fork",
        )  # fmt: skip
        try:
            elastic_launch(config, work)(words)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return child


def ranks_of(agent: int) -> list[int]:
    """The processes that an agent has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if int(parent) == agent and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that are whole, without what the clock says."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def is_saving(run: Path) -> bool:
    return any(not (folder / MANIFEST).exists() for folder in (run / "checkpoints").glob("step-*"))


def kill_one(agent: int, ranks: int, run: Path, draws: random.Random, while_saving: bool) -> bool:
    """Kills a random rank after some rounds, or as soon as a checkpoint is being written; whether one was.

    A round's checkpoint is waited for by the next one's, so that of the first is there by the third row.
    """
    until = len(rows_of(run)) + draws.randint(3, 5)
    while len(rows_of(run)) < until or len(ranks_of(agent)) < ranks:
        if os.waitpid(agent, os.WNOHANG) != (0, 0):
            raise SystemExit("the run was over before the last kill")
        time.sleep(0.005)
    time.sleep(draws.uniform(0, 0.05))
    deadline = time.monotonic() + 20
    while while_saving and not is_saving(run) and time.monotonic() < deadline:
        time.sleep(0.0005)
    saving = is_saving(run)
    os.kill(draws.choice(ranks_of(agent)), signal.SIGKILL)
    return saving


def run_and_kill(kills: int, seed: int, directory: Path, ranks: int, options: list[str]) -> dict[str, Any]:
    """Runs `whole` undisturbed, and others with up to as many kills as there are restarts."""
    draws = random.Random(seed)
    parse(options)  # which imports what reads them

    def end(agent: int, run: Path) -> None:
        if os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1]):
            raise SystemExit(run.with_suffix(".log").read_text())

    whole = directory / "whole"
    end(launch(ranks, [*options, "--run", str(whole)], whole.with_suffix(".log")), whole)
    killed, saving, resumed = 0, 0, []
    while killed < kills:
        run = directory / f"killed-{killed}"
        agent = launch(ranks, [*options, "--run", str(run)], run.with_suffix(".log"))
        wanted = min(RESTARTS, kills - killed)
        for _ in range(wanted):
            saving += kill_one(agent, ranks, run, draws, while_saving=(seed + killed) % 2 == 1)
            killed += 1
        end(agent, run)
        for name in ("student.safetensors", "start.safetensors"):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), f"{run.name}: {name} differs"
        assert rows_of(run) == rows_of(whole), f"{run.name}: rows differ"
        text = run.with_suffix(".log").read_text()
        resumed += (found := [int(number) for number in re.findall(r"resumed after round (\d+)", text)])
        assert len(found) == wanted, text
        print(f"{run.name}: {wanted} kills, went on after rounds {found}", file=sys.stderr, flush=True)
    return {"kills": killed, "while_saving": saving, "resumed_after": resumed}


if __name__ == "__main__":
    print(
        json.dumps(run_and_kill(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]))
    )
