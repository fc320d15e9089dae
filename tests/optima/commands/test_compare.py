"""The comparison of methods: what its runs differ in, that finished ones are kept, and what it refuses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import yaml

from optima.commands.compare import compare
from optima.commands.compare.methods import METHODS
from optima.commands.compare.runs import Asked, Cell, Comparison, run_command
from optima.commands.options import CompareConfig, Method
from optima.commands.parse import parse
from optima.run import main
from optima.runs.config import DistillConfig
from optima.runs.directory import flat
from optima.runs.rows import plain
from optima_core.errors import OptimaError

SHARED = {
    "engine.rounds": 2, "engine.steps_per_round": 1, "batch_size": 4, "probe_size": 4, "evaluate_every": 2,
    "evaluate_items": 4, "test_items": 8, "samples": 2, "threads": 1, "report": "false",
}  # fmt: skip


@pytest.fixture
def options(teacher_file: Path, student_file: Path, tmp_path: Path) -> list[str]:
    """A comparison of two methods whose runs take a second or two each."""
    words = ["compare", "--run", str(tmp_path / "runs"), "--task", "[vqa]", "--method", "[optima,only_text_decoder]"]
    shared = SHARED | {"teacher": teacher_file, "student": student_file}
    return words + [word for name, value in shared.items() for word in (f"--distill.{name}", str(value))]


def command_of(root: Path, method: Method, seed: int) -> list[str]:
    """The command of one run of a comparison on VQA in `root`."""
    asked = Asked(("vqa",), (method,), 1, "test")
    return run_command(Comparison(root, asked, "distill", DistillConfig(), METHODS), Cell("vqa", method, seed))


def resolved(method: Method, tmp_path: Path) -> dict[str, object]:
    """The settings of a method's run as the command line reads them, but for the run directory."""
    settings = plain(DistillConfig())
    for name in ("task", "run", "seed", "quiet", "resume"):
        settings.pop(name)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    words = command_of(tmp_path, method, 3)
    _, config = parse(words[words.index("distill") :])
    values = flat(plain(config))
    values.pop("run")
    return values


@pytest.mark.parametrize("method", METHODS)
def test_a_method_differs_from_optima_in_its_own_options_alone(method: Method, tmp_path: Path) -> None:
    ours, optima = resolved(method, tmp_path), resolved("optima", tmp_path)
    assert ours["seed"] == 3
    assert ours["task"] == "vqa"
    asked = {
        f"{name}.{key}" if isinstance(value, dict) else name: inner
        for name, value in METHODS[method].items()
        for key, inner in (value if isinstance(value, dict) else {"": value}).items()
    }
    assert {name: ours.get(name) for name in asked} == asked
    assert {name for name in ours | optima if ours.get(name) != optima.get(name)} <= asked.keys()
    assert method == "optima" or ours != optima | {"seed": 3}


def test_a_comparison_runs_what_is_missing_and_keeps_what_is_there(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--seeds", "1"]) == 0
    first = tmp_path / "runs" / "vqa" / "optima" / "seed-0" / "summary.json"
    written = first.stat().st_mtime_ns
    assert "optima" in capsys.readouterr().out
    assert main([*options, "--seeds", "2", "--jobs", "2"]) == 0
    assert first.stat().st_mtime_ns == written
    done = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("min left")]
    assert done == ["1/2", "2/2"]
    table = (tmp_path / "runs" / "comparison.md").read_text()
    assert "| only text decoder |" in table
    assert "| optima |" in table
    assert (tmp_path / "runs" / "comparison.html").exists()
    rows = (tmp_path / "runs" / "vqa" / "only_text_decoder" / "seed-1" / "metrics.jsonl").read_text()
    assert '"modules": ["text_decoder"]' in rows
    assert "image_encoder" not in rows.partition('"modules"')[2].partition("]")[0]

    page = (tmp_path / "runs" / "comparison.html").read_text()
    (tmp_path / "runs" / "comparison.html").unlink()
    assert main(["report", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "runs" / "comparison.html").read_text() == page

    assert main([*options, "--distill.batch_size", "6"]) == 2
    assert "distill.batch_size 4, now it is 6" in capsys.readouterr().err


def test_a_run_that_fails_is_named_in_a_line(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.safetensors"
    assert main([*options, "--seeds", "1", "--distill.teacher", str(missing)]) == 2
    line = capsys.readouterr().err
    assert "vqa optima seed 0 failed" in line or "vqa only_text_decoder seed 0 failed" in line
    assert "missing.safetensors does not exist" in line
    assert line.count("\n") == 1


def test_every_method_that_may_be_named_is_there() -> None:
    assert set(get_args(Method)) == set(METHODS)


def test_a_single_word_is_a_list_of_one_and_commas_separate_several() -> None:
    config = parse(["compare", "--task", "vqa", "--method=optima,uniform"])[1]
    assert (config.task, config.method) == (["vqa"], ["optima", "uniform"])


def test_modules_of_the_current_folder_are_not_run(tmp_path: Path) -> None:
    words = command_of(tmp_path, "optima", 0)
    (tmp_path / "json.py").write_text("raise SystemExit('ran')")
    place = words.index("optima.run")
    words[place : place + 1] = ["json.tool", "--help"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    found = subprocess.run(
        words[: place + 2], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_validation_needs_a_curve() -> None:
    with pytest.raises(ValueError, match="split validation needs a learning curve"):
        CompareConfig(split="validation", distill=DistillConfig(evaluate_every=0))


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(Exception, match="holds something, but no comparison"):
        compare(CompareConfig(run=tmp_path))


def test_a_comparison_that_was_killed_while_it_wrote_its_settings_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings.yaml.part").write_text("engine:")
    fails = [sys.executable, "-c", "raise SystemExit('it ran')"]
    monkeypatch.setattr("optima.commands.compare.runs.run_command", lambda *_: fails)
    with pytest.raises(OptimaError, match="vqa optima seed 0 failed: it ran"):
        compare(CompareConfig(run=tmp_path, task=["vqa"], method=["optima"], seeds=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "settings.yaml", "vqa"]


def test_sigterm_to_the_comparison_alone_stops_its_runs_and_is_told(options: list[str], tmp_path: Path) -> None:
    """Whoever sends it to one process, as a scheduler does, must not wait for a run's end."""
    words = [sys.executable, "-m", "optima.run", *options, "--seeds", "1", "--distill.engine.rounds", "1000000"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        run = tmp_path / "runs" / "vqa" / "optima" / "seed-0"
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.1)
        process.terminate()
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.strip().splitlines()[-1].startswith("optima: stopped")
    assert list((run / "checkpoints").glob("step-*/manifest.json")), "what it had done is saved"


def summary_of(after: float) -> str:
    scores = {model: {"accuracy": 50.0} for model in ("teacher", "before")} | {"after": {"accuracy": after}}
    return json.dumps({"task": "vqa", "scores": scores, "headline_metric": "accuracy", "seconds": 1, "peak_mib": 1})


def test_the_page_of_a_comparison_under_way_is_of_the_runs_that_have_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"task": ["vqa", "nlvr2"], "method": ["optima", "uniform"], "seeds": 2, "split": "test", "command": "c"}
    (tmp_path / "comparison.json").write_text(json.dumps(asked))
    assert main(["report", str(tmp_path)]) == 2
    assert "no run of optima" in capsys.readouterr().err
    for cell, score in (("vqa/optima/seed-0", 61.25), ("vqa/uniform/seed-1", 72.5), ("nlvr2/uniform/seed-0", 93.75)):
        (tmp_path / cell).mkdir(parents=True)
        (tmp_path / cell / "summary.json").write_text(summary_of(score))
    (tmp_path / "vqa/uniform/seed-1/report.html").write_text("its report")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "61.2" in page
    assert "72.5" in page
    assert "93.8" not in page
    assert 'href="vqa/uniform/seed-1/report.html"' in page
