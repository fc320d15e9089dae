"""A run that has ended, and the same run as it was while it went on."""

import sys
from pathlib import Path

import pytest

from optima.run import main

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))  # for `from synthetic_run import ...`


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, student_file: Path) -> Path:
    run = tmp_path_factory.mktemp("watch") / "run"
    options = (
        f"--teacher {teacher_file} --student {student_file} --engine.rounds 4 --engine.steps_per_round 2 --batch_size 4"
        f" --probe_size 6 --evaluate_every 0 --test_items 8 --samples 2 --threads 1 --quiet --run {run}"
    )
    assert main(options.split()) == 0
    return run


@pytest.fixture
def running(finished: Path, tmp_path: Path) -> Path:
    """The directory of the same run as it was in its third round, a row of which is half written."""
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    return tmp_path
