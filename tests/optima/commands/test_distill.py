"""Whole distillations with tiny models: what they leave behind, that they repeat, and that they survive a kill."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from miniatures import make_coco

from optima.coca.checkpoint import load_coca
from optima.coca.presets import PRESETS
from optima.run import main
from optima.runs.config import DistillConfig
from optima.runs.start import make_start
from optima.runs.summary import score_models
from optima.task import TASKS
from optima.tasks.pictograms import HEADLINE
from optima_core import CheckpointStore

WALL_CLOCK = ("seconds", "step_seconds")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in WALL_CLOCK} for row in rows]


@pytest.fixture(scope="module")
def finished(teacher_file: Path, student_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nobody may change."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    options = (
        f"--teacher {teacher_file} --student {student_file} --run {run} --engine.rounds 4 --engine.steps_per_round 2 "
        "--batch_size 4 --probe_size 6 --evaluate_every 2 --evaluate_items 4 --test_items 20 --samples 4 "
        "--checkpoint_every 1 --threads 1 --quiet --engine.optimiser.weight_decay 0.25 "
        "--engine.bandit.policy discounted_thompson"
    )
    assert main(options.split()) == 0
    return run


@pytest.fixture(autouse=True)
def no_report(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the finished run draws its report, which takes longer than all the rest of a tiny run."""
    monkeypatch.setattr("optima.commands.distill._draw_report", lambda directory: None)


def test_a_run_directory_holds_everything(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml", "start.safetensors", "metrics.jsonl", "student.safetensors", "checkpoints",
        "summary.json", "samples.json", "samples", "report.html",
    } <= names  # fmt: skip
    assert not [path for path in finished.rglob("*") if path.name.endswith(".part")]


def test_the_summary_has_the_promised_fields(finished: Path, teacher_file: Path, student_file: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["scores"]) == {"teacher", "before", "after"}
    metrics = {"scene_accuracy", "kind_accuracy", "count_accuracy"}
    assert all(set(scores) == metrics for scores in summary["scores"].values())
    assert summary["seconds"] > 0
    assert 100 < summary["peak_mib"] < 100_000
    assert summary["command"].startswith("optima ")
    assert summary["test_items"] == 20
    assert [point["step"] for point in summary["learning_curve"]] == [0, 4, 8]
    work = summary["layer_work"]
    assert work["layers_tapped"] == pytest.approx(1 / 3)  # one module of one layer each, of three
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert set(work["step_seconds"]) == {row["modules"][0] for row in rows}
    assert all(0 < seconds < summary["seconds"] for seconds in work["step_seconds"].values())
    for role, path in (("teacher", teacher_file), ("student", student_file)):
        assert summary["parameters"][role] == sum(p.numel() for p in load_coca(path).parameters())


def test_metrics_have_a_row_a_round_that_explains_the_choice(finished: Path) -> None:
    modules = ["image_encoder", "text_decoder", "multimodal_decoder"]
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        assert row["modules"] == [modules[row["arm"]]]
        tried = {earlier["modules"][0] for earlier in rows[: row["round"]]}
        assert set(row["mean"]) == set(row["std"]) == set(row["pulls"]) == tried
        assert {"task", "logits", f"hidden/{row['modules'][0]}/0"} <= set(row["losses"])
        assert isinstance(row["reward"], float)
        assert all(name in row for name in WALL_CLOCK)


def test_the_student_was_trained_and_the_teacher_was_not(finished: Path, student_file: Path) -> None:
    before, after = load_coca(student_file), load_coca(finished / "student.safetensors")
    assert after.config == before.config
    changed = [
        name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])
    ]
    assert any(name.startswith("image_encoder.blocks") for name in changed)
    assert any(name.startswith("multimodal_decoder.layers") for name in changed)


def test_the_average_is_what_is_kept_and_other_ways_of_training_work_together(brief: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--engine.ema", "0.5", "--engine.accumulate", "2", "--recompute", "true", "--evaluate_items", "0"]
    layer_map = json.dumps({"text_decoder": [0]})
    assert main([*brief, "--run", str(run), *options, "--layer_map", layer_map]) == 0
    kept = load_coca(run / "student.safetensors").state_dict()
    state = CheckpointStore(run / "checkpoints").load()
    assert state is not None
    average = {name.removeprefix("module."): x for name, x in state["distiller"]["ema"].items() if "module." in name}
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, average[name])
    name = "multimodal_decoder.head.weight"
    assert not torch.equal(kept[name], state["distiller"]["student"][name])


def test_a_layer_map_of_an_unknown_module_is_refused(
    brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*brief, "--run", str(tmp_path / "run"), "--layer_map", json.dumps({"texts": [0]})]) == 2
    assert "layer_map names the module 'texts'; there are image_encoder" in capsys.readouterr().err


def test_samples_name_images_that_exist(finished: Path) -> None:
    samples = json.loads((finished / "samples.json").read_text())
    assert len(samples) == 4
    for sample in samples:
        assert all((finished / name).is_file() for name in sample["images"])
        assert {"reference", "teacher", "before", "after", "correct"} <= set(sample)


def test_the_same_seed_gives_the_same_metrics_and_weights_and_another_seed_does_not(
    finished: Path, tmp_path: Path
) -> None:
    again = ["--config", str(finished / "config.yaml")]
    assert main([*again, "--run", str(tmp_path / "again")]) == 0
    assert rows_of(tmp_path / "again") == rows_of(finished)
    ours, theirs = (run / "student.safetensors" for run in (tmp_path / "again", finished))
    assert ours.read_bytes() == theirs.read_bytes()
    assert main([*again, "--run", str(tmp_path / "other"), "--seed", "1", "--test_items", "4"]) == 0
    assert rows_of(tmp_path / "other") != rows_of(finished)


def test_the_written_config_is_the_resolved_one(finished: Path) -> None:
    values = yaml.safe_load((finished / "config.yaml").read_text())
    assert values["engine"]["rounds"] == 4
    assert values["engine"]["optimiser"]["weight_decay"] == 0.25
    assert values["engine"]["objective"]["temperature"] == DistillConfig().engine.objective.temperature
    assert values["resume"] is False


def test_the_report_can_be_written_anew_and_stands_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = (finished / "report.html").read_text(encoding="utf-8")
    (finished / "report.html").unlink()
    assert main(["report", "--run", str(finished)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (finished / "report.html").read_text(encoding="utf-8") == first
    assert 'src="http' not in first
    assert 'href="http' not in first


def test_evaluate_agrees_with_the_summary(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(finished / "student.safetensors")
    assert main(["evaluate", "--model", model, "--tasks", "[captioning]", "--items", "20"]) == 0
    scores = json.loads((finished / "summary.json").read_text())["scores"]["after"]
    text = capsys.readouterr().out
    for name, value in scores.items():
        assert any(name in line and f"{value:.1f}" in line for line in text.splitlines())
    assert main(["evaluate", "--model", model, "--tasks", "[vqa]"]) == 2
    assert "has no head for vqa" in capsys.readouterr().err


@pytest.mark.parametrize("task", [task for task in TASKS if task != "captioning"])
def test_every_task_runs_and_gives_the_student_the_head_it_lacks(
    task: str, brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*brief, "--run", str(run), "--task", task, "--engine.rounds", "2", "--test_items", "12"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["headline_metric"] == HEADLINE[task]  # type: ignore[index]
    assert all(0 <= scores["accuracy"] <= 100 for scores in summary["scores"].values())
    assert task in load_coca(run / "student.safetensors").head_specs
    samples = json.loads((run / "samples.json").read_text())
    assert all(len(sample["images"]) == (2 if task == "nlvr2" else 1) and sample["prompt"] for sample in samples)
    table = capsys.readouterr().out
    for heading in ("teacher", "student before", "student after", "accuracy"):
        assert heading in table


def test_progress_is_one_plain_line_a_round_off_a_terminal(
    brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = [word for word in brief if word != "--quiet"]
    assert main([*loud, "--run", str(tmp_path / "run"), "--engine.rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == ["1/2", "2/2"]
    for line in rounds:
        assert "reward" in line
        assert "(one round)" in line
        assert "±" not in line, "a single round tells nothing of a spread"
        assert "left" in line


def test_a_run_of_other_settings_is_not_resumed_and_not_touched(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    config = ["--config", str(finished / "config.yaml"), "--resume"]
    for option, words in (
        (["--engine.optimiser.weight_decay", "0.5"], "engine.optimiser.weight_decay was 0.25 there and is 0.5 now"),
        (["--task", "vqa"], "task was captioning there and is vqa now"),
        (["--engine.bandit.options", "{gamma: 0.5}"], "engine.bandit.options.gamma was None there and is 0.5 now"),
    ):
        assert main([*config, *option]) == 2
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == files


def test_resuming_a_finished_run_trains_no_further(finished: Path, tmp_path: Path) -> None:
    weights, rows = (finished / "student.safetensors").read_bytes(), rows_of(finished)
    assert main(["--config", str(finished / "config.yaml"), "--resume"]) == 0
    assert (finished / "student.safetensors").read_bytes() == weights
    assert rows_of(finished) == rows


def test_a_run_is_resumed_with_its_own_options(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(CheckpointStore(run / "checkpoints").paths()[-1])  # so that there is a round left to do
    assert main(["--run", str(run), "--resume"]) == 0
    assert (run / "student.safetensors").read_bytes() == (finished / "student.safetensors").read_bytes()
    assert rows_of(run) == rows_of(finished)
    command = json.loads((run / "summary.json").read_text())["command"]
    assert command == json.loads((finished / "summary.json").read_text())["command"], "the one that reproduces the run"


def test_a_directory_that_does_not_exist_is_not_resumed(
    brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*brief, "--run", str(tmp_path / "misspelt"), "--resume"]) == 2
    assert "misspelt does not exist, so there is nothing to resume" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_is_made_longer_where_that_changes_nothing_that_was_done(
    brief: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    falling = [*brief, "--engine.optimiser.schedule", "constant", "--engine.optimiser.warmup", "0"]
    constant = [*falling, "--engine.strength_first", "2", "--engine.strength_last", "2"]
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    assert main([*constant, "--run", str(whole), "--engine.rounds", "6"]) == 0
    assert main([*constant, "--run", str(longer), "--engine.rounds", "4"]) == 0
    assert main(["--run", str(longer), "--resume", "--engine.rounds", "6"]) == 0
    assert (longer / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    assert rows_of(longer) == rows_of(whole)
    assert yaml.safe_load((longer / "config.yaml").read_text())["engine"]["rounds"] == 6
    capsys.readouterr()
    assert main(["--run", str(longer), "--resume", "--engine.rounds", "5"]) == 2
    assert "engine.rounds was 6 there and is 5 now" in capsys.readouterr().err
    assert main(["--run", str(finished), "--resume", "--engine.rounds", "6"]) == 2
    assert "the learning rate follows a cosine over all rounds" in capsys.readouterr().err
    assert main([*falling, "--run", str(tmp_path / "falling"), "--engine.rounds", "1"]) == 0
    assert main(["--run", str(tmp_path / "falling"), "--resume", "--engine.rounds", "2"]) == 2
    assert "layer losses goes from 30 to 0.1 over all rounds" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["deleted", "bad row"])
def test_rows_that_are_lost_do_not_stop_a_resumed_run(damage: str, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    if damage == "deleted":
        (run / "metrics.jsonl").unlink()
    else:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("\n".join([lines[0], '{"half', *lines[2:]]) + "\n")
    (run / "summary.json").unlink()
    with pytest.warns(UserWarning, match="lacks round"):
        assert main(["--run", str(run), "--resume"]) == 0
    assert (run / "summary.json").exists()
    assert [row["round"] for row in rows_of(run)] == ([] if damage == "deleted" else [1, 3, 4])


def test_the_start_is_made_once_and_kept(finished: Path, student_file: Path, tmp_path: Path) -> None:
    start, given = load_coca(finished / "start.safetensors"), load_coca(student_file)
    assert all(torch.equal(start.state_dict()[name], tensor) for name, tensor in given.state_dict().items())


def test_the_student_before_is_the_one_that_was_trained(
    brief: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, torch.Tensor]] = []

    def counted(*arguments: Any) -> Any:
        start = make_start(*arguments)
        made.append({name: tensor.clone() for name, tensor in start.state_dict().items()})
        return start

    scored: list[dict[str, torch.Tensor]] = []

    def scores(models: Any, *rest: Any) -> Any:
        scored.append(models["before"].state_dict())
        return score_models(models, *rest)

    monkeypatch.setattr("optima.runs.start.make_start", counted)
    monkeypatch.setattr("optima.commands.distill.score_models", scores)
    run = tmp_path / "run"
    assert main([*brief, "--run", str(run), "--init", "teacher_pca"]) == 0
    shutil.rmtree(CheckpointStore(run / "checkpoints").paths()[-1])
    assert main(["--run", str(run), "--resume"]) == 0
    assert len(made) == 1
    for before in scored:
        assert all(torch.equal(before[name], tensor) for name, tensor in made[0].items())


def test_an_unusable_image_that_the_start_meets_is_named_and_the_run_goes_on(brief: list[str], tmp_path: Path) -> None:
    root = make_coco(tmp_path / "data", 24)
    image = next(path for path in sorted(root.rglob("*.jpg")) if "train" in str(path))
    image.write_bytes(image.read_bytes()[:200])
    words = f"--data.name coco --data.root {root} --data.loader.workers 0 --data.loader.max_rejected 0.2".split()
    run = tmp_path / "run"
    options = [*brief, "--run", str(run), *words, "--init", "teacher_pca", "--evaluate_every", "0", "--test_items", "2"]
    assert main([*options, "--engine.rounds", "1"]) == 0
    assert image.name in (run / "rejected.jsonl").read_text()


def test_the_learning_curve_ends_with_the_run(brief: list[str], tmp_path: Path) -> None:
    assert main([*brief, "--run", str(tmp_path / "run"), "--evaluate_every", "3"]) == 0
    curve = json.loads((tmp_path / "run" / "summary.json").read_text())["learning_curve"]
    assert [point["step"] for point in curve] == [0, 6, 8]


def test_a_damaged_checkpoint_costs_only_its_rounds(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--config", str(finished / "config.yaml"), "--run", str(run)]
    assert main(options) == 0
    newest = CheckpointStore(run / "checkpoints").paths()[-1]
    (damaged,) = newest.glob("*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (run / "student.safetensors").unlink()
    with pytest.warns(UserWarning, match=newest.name):
        assert main([*options, "--resume"]) == 0
    assert rows_of(run) == rows_of(finished)
    assert (run / "student.safetensors").read_bytes() == (finished / "student.safetensors").read_bytes()


def test_a_loss_that_explodes_is_named_and_the_last_checkpoint_stays_readable(
    brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    # The first round's rate is a tiny share of the peak, the second's is not.
    options = ["--engine.rounds", "1000", "--engine.steps_per_round", "1", "--engine.optimiser.warmup", "1"]
    status = main([*brief, "--run", str(run), *options, "--engine.optimiser.learning_rate", "1e4"])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.count("\n") == 1
    assert "became NaN or infinite in round" in captured.err
    assert any(name in captured.err for name in ("task", "logits", "hidden/", "attention/"))
    state = CheckpointStore(run / "checkpoints").load()
    assert state is not None
    assert state["distiller"]["round"] == len(rows_of(run))
    assert all(torch.isfinite(tensor).all() for tensor in state["distiller"]["student"].values())


def test_a_disk_that_fills_up_at_the_end_is_one_line(
    brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "samples/0000-0.png")

    monkeypatch.setattr("optima.commands.distill.write_samples", full)
    assert main([*brief, "--run", str(tmp_path / "run")]) == 2
    message = "optima: samples/0000-0.png cannot be read or written: No space left on device\n"
    assert capsys.readouterr().err == message


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "optima.run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_rounds(run: Path, rounds: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= rounds:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no {rounds} rounds came: {process.communicate()}")


def test_killed_in_the_middle_and_resumed_equals_the_uninterrupted_run(brief: list[str], tmp_path: Path) -> None:
    options = [*brief, "--engine.rounds", "30", "--checkpoint_every", "3"]
    assert main([*options, "--run", str(tmp_path / "whole")]) == 0
    run = tmp_path / "killed"
    process = start([*options, "--run", str(run)])
    wait_for_rounds(run, 8, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "student.safetensors").exists(), "the run was over before it was killed"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"round": 9, "st')  # a row cut short, as a crash may leave it
    assert main([*options, "--run", str(run), "--resume"]) == 0
    assert (run / "student.safetensors").read_bytes() == (tmp_path / "whole" / "student.safetensors").read_bytes()
    assert rows_of(run) == rows_of(tmp_path / "whole")
    curves = [json.loads((tmp_path / name / "summary.json").read_text())["learning_curve"] for name in ("whole", run)]
    assert curves[0] == curves[1]


def test_asked_to_stop_a_run_saves_its_last_round_and_says_how_to_go_on(brief: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*brief, "--run", str(run), "--engine.rounds", "500", "--checkpoint_every", "400"]
    process = start(options)
    wait_for_rounds(run, 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == ["optima: stopped; continue with the same command and --resume"]
    state = CheckpointStore(run / "checkpoints").load()
    assert state is not None
    assert state["distiller"]["round"] == len(rows_of(run)) < 400


def test_event_files_hold_every_round(brief: list[str], tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the tensorboard package"
    )
    run = tmp_path / "run"
    assert main([*brief, "--run", str(run), "--tensorboard"]) == 0
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = [(event.step, event.value) for event in events.Scalars("reward")]
    assert rewards == [(row["step"], pytest.approx(row["reward"], rel=1e-6)) for row in rows]
    assert {"probe/task", "train/task", "validation/scene_accuracy"} <= set(events.Tags()["scalars"])


def test_a_student_is_chosen_by_the_name_of_a_preset(
    brief: list[str], student_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # Full-size presets take images of other sizes than pictograms have, so a small one stands in.
    small = load_coca(student_file).config
    monkeypatch.setitem(PRESETS, "tiny6-16", small)
    place = brief.index("--student")
    options = [*brief[:place], *brief[place + 2 :], "--student", "tiny6", "--run", str(tmp_path / "run")]
    assert main([*options, "--init", "checkpoint"]) == 2
    assert "is a preset, which has sizes but no weights; give --init" in capsys.readouterr().err
    assert main(options) == 0
    assert load_coca(tmp_path / "run" / "student.safetensors").config == small
    options[-1] = str(tmp_path / "other")
    assert main([*options, "--init", "scratch", "--student", "tiny6-32"]) == 2
    assert "takes images of 224 pixels" in capsys.readouterr().err
    assert main([*options, "--student", "tiny12"]) == 2
    assert "student tiny12 has patches of 14, 32, 18 pixels, the teacher's have 16" in capsys.readouterr().err
