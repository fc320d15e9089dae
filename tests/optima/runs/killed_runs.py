"""Kills a run at random moments and resumes it, until it ends: KILLS SEED DIRECTORY OPTIONS...

Every start is a fork of a process that has imported everything but computed nothing: what a start costs is paid once.
Prints, as JSON: kills, how many of them fell into the writing of a checkpoint, how often checkpoints were read, and how
many rounds were done at the last kill.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from optima.run import main
from optima_core import CheckpointStore
from optima_core.checkpoint import MANIFEST


def start(options: list[str]) -> int:
    """The process id of a run."""
    child = os.fork()
    if child == 0:
        os._exit(main(options))
    return child


def rounds_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_saving(run: Path) -> bool:
    folders = (run / "checkpoints").glob("step-*")
    return any(not (folder / MANIFEST).exists() for folder in folders)


def kill_after_some_rounds(child: int, run: Path, draws: random.Random, while_saving: bool) -> bool:
    """Whether it was still there to be killed: at any moment, or as soon as a checkpoint is being written."""
    until = rounds_of(run) + draws.randint(2, 4)  # after the second round the first is in a checkpoint
    while rounds_of(run) < until:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.001)
    time.sleep(draws.uniform(0, 0.02))
    while while_saving and not is_saving(run):
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def run_and_kill(kills: int, seed: int, directory: Path, options: list[str]) -> dict[str, int]:
    """Runs `whole` undisturbed and `killed` with kills; both have ended when this returns."""
    assert os.waitstatus_to_exitcode(os.waitpid(start([*options, "--run", str(directory / "whole")]), 0)[1]) == 0
    draws, run = random.Random(seed), directory / "killed"
    killed = torn = read = rounds = 0
    warnings.simplefilter("error")  # a checkpoint that cannot be read is warned of
    while killed < kills:
        resume = ["--resume"] if run.exists() else []
        if not kill_after_some_rounds(start([*options, "--run", str(run), *resume]), run, draws, killed % 2 == 1):
            raise SystemExit(f"the run was over after {killed} kills")
        killed, rounds = killed + 1, rounds_of(run)
        torn += is_saving(run)
        paths = CheckpointStore(run / "checkpoints").paths()
        for path in paths:
            # Alone in a directory, it cannot be fallen back from.
            alone = directory / "alone"
            alone.mkdir(exist_ok=True)
            shutil.copytree(path, alone / path.name)
            assert CheckpointStore(alone).load() is not None
            shutil.rmtree(alone / path.name)
        read += len(paths)
    assert os.waitstatus_to_exitcode(os.waitpid(start([*options, "--run", str(run), "--resume"]), 0)[1]) == 0
    return {"kills": killed, "while_saving": torn, "checkpoints_read": read, "rounds_before_last_kill": rounds}


if __name__ == "__main__":
    print(json.dumps(run_and_kill(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
