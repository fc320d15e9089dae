"""A run's directory: what keeps a run out of it, what a killed one may leave there, and the rows of its rounds."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest

from optima.runs.config import DistillConfig, PretrainConfig
from optima.runs.directory import RunDirectory, fingerprint
from optima.runs.reading import read_rounds
from optima.runs.rows import Round
from optima_core import DistillerConfig, OptimaError


def enter(path: Path, resume: bool = False) -> RunDirectory:
    return RunDirectory(path, resume=resume, keep=1)


def fail_in(path: Path, name: str) -> None:
    """A run that writes a file and then ends in an error."""
    with contextlib.suppress(ZeroDivisionError), enter(path) as directory:
        directory.write_text(name, "something")
        raise ZeroDivisionError


def row(number: int) -> Round:
    return Round(
        round=number, step=2 * number, arm=0, modules=("a",), strengths={"a": 1.0}, weights={"a": 9.0},
        agreement={"a": 0.2}, reward=0.1 * number, pulls={"a": number}, mean={"a": 0.5},
        std={"a": 0.1}, losses={"task": 1.0}, probe={"task": 1.0}, learning_rate=1e-3, tapped=1.0, step_seconds=0.1,
        seconds=float(number),
    )  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name", [".writable", "config.yaml.part", "rejected.jsonl", "start.safetensors", "start.safetensors.part"]
)
def test_what_a_run_leaves_that_is_killed_before_it_begins_is_in_nobodys_way(
    name: str, resume: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("left")
    with enter(tmp_path, resume) as directory:
        directory.write_config(PretrainConfig())
    assert (tmp_path / "config.yaml").exists()
    assert (tmp_path / name).exists() == name.startswith("."), "what another run left is not taken for this one's"


def test_an_error_before_a_run_begins_leaves_nothing_but_what_it_names(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    fail_in(run, "start.safetensors")
    assert not list(tmp_path.iterdir())
    fail_in(run, "rejected.jsonl")
    assert [path.name for path in run.iterdir()] == ["rejected.jsonl"]
    with enter(run):
        pass


def test_a_run_that_has_begun_stays_whatever_happens(tmp_path: Path) -> None:
    fail_in(tmp_path / "run", "config.yaml")
    with pytest.raises(OptimaError, match="is not empty; continue it with --resume"):
        enter(tmp_path / "run")
    with enter(tmp_path / "run", resume=True):
        pass


def test_there_must_be_a_directory_to_resume(tmp_path: Path) -> None:
    with pytest.raises(OptimaError, match="does not exist, so there is nothing to resume"):
        enter(tmp_path / "misspelt", resume=True)
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_told_who_is_there(tmp_path: Path) -> None:
    with enter(tmp_path / "run") as directory:
        directory.write_config(PretrainConfig())
        code = f"from optima.runs.directory import RunDirectory; from pathlib import Path\n" \
            f"RunDirectory(Path({str(tmp_path / 'run')!r}), resume=True, keep=1)"  # fmt: skip
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert found.returncode == 1
        assert f"is in use by process {os.getpid()}; wait until that ends" in found.stderr
    with enter(tmp_path / "run", resume=True):
        pass


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a run that never began, and ends just then."""
    import fcntl

    taken = fcntl.flock

    def removed_just_before(file: TextIO, operation: int) -> None:
        monkeypatch.setattr("fcntl.flock", taken)
        (tmp_path / ".lock").unlink()
        taken(file, operation)

    monkeypatch.setattr("fcntl.flock", removed_just_before)
    with enter(tmp_path) as directory:
        directory.write_config(PretrainConfig())
        with pytest.raises(OptimaError, match=f"is in use by process {os.getpid()}"):
            enter(tmp_path, resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_loaders_process_does_not_hold_the_directory_of_a_run_that_is_gone(tmp_path: Path) -> None:
    directory = enter(tmp_path / "run")
    directory.write_config(PretrainConfig())
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, b"here")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(heard, 4) == b"here"
        directory.__exit__(None, None, None)
        with enter(tmp_path / "run", resume=True):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_rows_are_known_by_their_round_and_what_is_wrong_with_them_is_said(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    with enter(tmp_path / "run") as directory:
        for number in (1, 2, 2, 4, 5, 6):
            directory.append_round(row(number))
        path = directory.metrics
        lines = path.read_text().splitlines()
        lines[1] = "\ufffd" + lines[1]
        path.write_bytes(b"\xff" + "\n".join(lines)[1:].encode() + b'\n{"round": 7, "st')
        kept = directory.rounds(5)
    assert [found.round for found in kept] == [2, 4, 5]
    assert [found.round for found in read_rounds(path)] == [2, 4, 5]
    said = [str(warning.message) for warning in recwarn]
    assert [f"line {number}: not JSON" in message for number, message in zip((1, 2, 7), said, strict=False)] == [
        True
    ] * 3
    assert said[3:] == [f"{path} lacks round 1, 3; so will the report"]


def test_rows_that_are_all_there_are_kept_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    with enter(tmp_path / "run") as directory:
        for number in range(1, 6):
            directory.append_round(row(number))
        before = directory.metrics.read_text().splitlines()
        assert directory.rounds(4) == [row(number) for number in range(1, 5)]
        assert directory.metrics.read_text().splitlines() == before[:4]
        directory.append_round(row(3))
        directory.rounds(4)
    assert ["round 3 once more" in str(warning.message) for warning in recwarn] == [True]
    assert [json.loads(line)["round"] for line in directory.metrics.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 2}, ["threads was 1 and is 2 now; the last bits of what follows may differ"]),
        ({"engine": DistillerConfig(teacher_ahead=False)}, ["engine.teacher_ahead was True and is False now"]),
        ({"quiet": True}, []),
    ],
)
def test_other_threads_are_told_to_change_the_last_bits(
    change: dict[str, Any], said: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    config = DistillConfig(run=tmp_path, threads=1)
    with enter(tmp_path) as directory:
        directory.write_config(config)
    with enter(tmp_path, resume=True) as directory:
        for _ in range(2):
            directory.write_config(replace(config, **change))
    assert len(recwarn) == len(said)
    for warning, expected in zip(recwarn, said, strict=True):
        assert expected in str(warning.message)


@pytest.mark.parametrize("content", [b"[", b"\xff", b"a list", b"threads: {}", b""])
def test_a_configuration_that_is_damaged_is_written_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with enter(tmp_path, resume=True) as directory:
        directory.write_config(PretrainConfig())
    assert "threads: 0" in (tmp_path / "config.yaml").read_text()


def test_how_fast_a_run_is_made_may_change_when_it_is_resumed(tmp_path: Path) -> None:
    def of(engine: DistillerConfig, threads: int = 0) -> str:
        return fingerprint(DistillConfig(run=tmp_path, engine=engine, threads=threads))

    whole = of(DistillerConfig())
    assert of(DistillerConfig(teacher_ahead=False), threads=2) == whole
    assert of(DistillerConfig(accumulate=2)) != whole
    assert "engine.accumulate" in json.loads(whole)
