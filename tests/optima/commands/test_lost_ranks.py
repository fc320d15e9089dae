"""Ranks that are killed or hang under `torchrun --max-restarts`: the run goes on by itself, to the same bits.

OPTIMA_TEST_KILLS says how often a rank is killed (1): OPTIMA_TEST_KILLS=20 python -m pytest -s <this file>
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched_ranks import rank_process, rows_of, start, told, wait_for_rounds

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")

KILLS = int(os.environ.get("OPTIMA_TEST_KILLS", "1"))
STRATEGIES = ("fsdp", "ddp")[: 1 + (KILLS > 3)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_whose_ranks_are_killed_ends_as_if_nothing_had_happened(
    strategy: str, brief: list[str], tmp_path: Path, seed: int
) -> None:
    loud = [word for word in brief if word != "--quiet"]
    script, kills = Path(__file__).with_name("lost_ranks.py"), KILLS // len(STRATEGIES)
    # Each start adds five rounds or so, before a rank is killed.
    rounds = 8 * min(kills, 3)
    words = f"--engine.rounds {rounds} --engine.steps_per_round 1 --evaluate_every 4 --parallel {strategy}"
    options = [*words.split(), "--test_items", "4", "--samples", "1", "--report", "false"]
    done = subprocess.run(
        [sys.executable, str(script), str(kills), str(seed), str(tmp_path), "2", *loud, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300 + 120 * kills,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] == len(report["resumed_after"]) == kills


def test_the_run_of_somebody_else_is_not_taken_for_ones_own_by_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optima.runs.directory import RunDirectory
    from optima_core import OptimaError

    run = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    with RunDirectory(run, resume=False, keep=2) as directory:
        directory.write_text("config.yaml", "run: run\n")
    for launcher in ("theirs", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launcher)
        with pytest.raises(OptimaError, match="is not empty; continue it with --resume"):
            RunDirectory(run, resume=False, keep=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what a torchrun without a rendezvous calls itself
    with RunDirectory(run, resume=True, keep=2):
        pass
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(OptimaError, match="is not empty; continue it with --resume"):
        RunDirectory(run, resume=False, keep=2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with RunDirectory(run, resume=True, keep=2):
        pass
    with pytest.raises(OptimaError, match="is not empty; continue it with --resume"):
        RunDirectory(run, resume=False, keep=2)


def test_a_restart_goes_on_with_what_its_launcher_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optima.runs.directory import RunDirectory

    run = tmp_path / "run"
    for name in ("ours", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        with RunDirectory(run / name, resume=False, keep=2) as directory:
            directory.write_text("config.yaml", "run: run\n")
        for _ in range(2):
            with RunDirectory(run / name, resume=False, keep=2):
                pass


@pytest.mark.skipif(KILLS <= 3, reason="waits for a minute; OPTIMA_TEST_KILLS=4 runs it")
def test_a_rank_that_hangs_is_named_and_torchrun_goes_on(brief: list[str], tmp_path: Path) -> None:
    rounds, run = 40, tmp_path / "run"
    loud = [word for word in brief if word != "--quiet"]
    options = [*loud, "--engine.rounds", str(rounds), "--engine.steps_per_round", "1", "--report", "false"]
    process = start([*options, "--run", str(run), "--patience", "20"], restarts=1)
    wait_for_rounds(run, 3, process)
    began = time.monotonic()
    os.kill(rank_process(process, 1), signal.SIGSTOP)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    print(told(errors), time.monotonic() - began)
    (line,) = told(errors)
    assert re.match(r"optima: no progress for 20 s: rank 1 does not answer; it is waited for: rank 0 .*, at ", line)
    assert sum("resumed after round" in line for line in output.splitlines()) == 1
    assert len(rows_of(run)) == rounds
