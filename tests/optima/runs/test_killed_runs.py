"""Random kill -9, resumed each time: nothing that was saved is ever lost or changed.

OPTIMA_TEST_KILLS says how many (3; twenty take a minute): OPTIMA_TEST_KILLS=20 python -m pytest -s <this file>
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from miniatures import make_coco

from optima_core import CheckpointStore

KILLS = int(os.environ.get("OPTIMA_TEST_KILLS", "3"))


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    brief: list[str], tmp_path: Path, seed: int
) -> None:
    # Each start adds five rounds at the most, before it is killed.
    options = [*brief, "--engine.rounds", str(6 * KILLS), "--engine.steps_per_round", "1", "--report", "false"]
    refuse_traces_of_kills(KILLS, seed, tmp_path, options)


def test_a_run_on_official_data_that_is_killed_within_an_epoch_goes_on_with_the_samples_that_are_left(
    brief: list[str], tmp_path: Path, seed: int
) -> None:
    root = make_coco(tmp_path / "data", 24)  # 2 a step: an epoch is 12 rounds
    words = (
        f"--data.name coco --data.root {root} --data.loader.engine torch --data.loader.workers 0 --batch_size 2 "
        "--engine.rounds 15 --engine.steps_per_round 1 --evaluate_every 0 --test_items 2 --samples 1 --report false"
    )
    report = refuse_traces_of_kills(1, seed, tmp_path, [*brief, *words.split()])
    assert 0 < report["rounds_before_last_kill"] < 12


def refuse_traces_of_kills(kills: int, seed: int, tmp_path: Path, options: list[str]) -> dict[str, int]:
    """Runs once undisturbed and once with kills, and compares every number and weight of the two."""
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(kills), str(seed), str(tmp_path), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=60 + 30 * kills,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] == kills
    assert report["checkpoints_read"] >= kills
    whole, killed = ((tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    clock = {"seconds", "step_seconds"}
    rows = [
        [
            {name: value for name, value in json.loads(line).items() if name not in clock}
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    return report


def contents(store: CheckpointStore) -> dict[Path, bytes]:
    """All that there is of checkpoints."""
    return {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files as Linux does")
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_line_and_the_one_before_is_resumed(
    brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    from optima.run import main

    run = tmp_path / "run"
    options = [*brief, "--run", str(run), "--report", "false"]
    assert main([*options, "--engine.rounds", "4"]) == 0
    store = CheckpointStore(run / "checkpoints")
    newest = store.paths()[-1]
    shutil.rmtree(newest)  # so that there is a round left to do
    before = contents(store)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        status = main([*options, "--engine.rounds", "4", "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    error = capsys.readouterr().err
    name = rf"{re.escape(str(newest))}/00000-\w+\.safetensors"
    assert re.fullmatch(f"optima: cannot write {name}: File too large; what was saved before is intact\n", error)
    assert contents(store) == before
    assert main([*options, "--engine.rounds", "4", "--resume"]) == 0
