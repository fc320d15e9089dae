"""Mistakes on the command line: exit status 2 and one line that says what would be right; help and configurations."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from optima.coca.presets import TEACHERS
from optima.commands import COMMANDS
from optima.run import main
from optima.runs.config import DistillConfig, PretrainConfig
from optima_core.bandit import POLICIES


def complaint_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line of a mistake."""
    status = main(arguments)
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.err.startswith("optima: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert len(captured.err) < 3000
    assert "Traceback" not in captured.out + captured.err
    return captured.err.strip()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bach_size", "3"], ["unknown option bach_size", "batch_size?"]),
        (["--bach_size=3"], ["unknown option bach_size", "batch_size?"]),
        (["--engine.round", "3"], ["unknown option engine.round;", "engine.rounds?"]),
        (["--batch_size", "abc"], ["batch_size must be", "int", "abc"]),
        (["--batch_size", "0"], ["batch_size must be at least 1, got 0"]),
        (["--seed", "-1"], ["seed must be at least 0, got -1"]),
        (["--parallel", "hsdp", "--shard_over", "-1"], ["shard_over must be at least 0, got -1"]),
        (["--patience", "0.5"], ["patience must be from 1 to 1e6 seconds, got 0.5"]),
        (["--parallel", "tp"], ["parallel must be", "ddp", "fsdp", "hsdp", "got tp"]),
        (["--task", "vqaa"], ["task", "captioning", "nlvr2", "vqaa"]),
        (["--layer_map", "first"], ["layer_map", "uniform", "last", "first"]),
        (["--engine.objective.normalize", "l3"], ["engine.objective.normalize", "layernorm", "null", "l3"]),
        (["--engine.objective.relation_heads", "x"], ["relation_heads must be int or null, got x"]),
        (["--engine.rounds", "0"], ["rounds must be at least 1, got 0"]),
        (["--engine.optimiser.learning_rate", "-1"], ["learning_rate", "-1"]),
        (["--engine.objective.hidden", "-1"], ["hidden", "-1"]),
        (["--quiet", "maybe"], ["maybe"]),
        (["--task"], ["--task", "expected one argument"]),
        (["--config", "quick_recipe"], ["quick_recipe", "neither a file nor a recipe", "coca_large_to_base_coco"]),
        (["distil"], ["unknown command distil", "distill?"]),
        (["evaluate"], ["model"]),
        (["evaluate", "--model", "x", "--tasks", "[vqa,foo]"], ["tasks", "vqa", "foo"]),
        (["evaluate", "--model", "x", "--tasks", "[vqa]", "--items", "-1"], ["items must be at least 0"]),
        (["evaluate", "--model", "nowhere.safetensors", "--tasks", "[vqa]"], ["nowhere.safetensors does not exist"]),
        (["evaluate", "--model", "d/" * 3000, "--tasks", "vqa"], ["/ ... /", "File name too long"]),
        (["report", "--run", "nowhere"], ["nowhere", "does not exist"]),
        (["pretrain", "--images", "3"], ["images must be an even number, got 3"]),
        (["pretrain", "--checkpoint_every", "0"], ["checkpoint_every must be at least 1, got 0"]),
        (["pretrain", "--model.image_encoder.width", "33"], ["image_encoder.width 33"]),
        (["simulate", "--policies", "[foo]"], ["policies", "foo"]),
        (["simulate", "--seeds", "9" * 20], ["seeds must be a number that 64 bits hold, got 9999"]),
        (["--engine.rounds", str(2**63)], ["engine.rounds must be a number that 64 bits hold"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = complaint_of(capsys, arguments)
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_sise: 3\n", ["unknown option batch_sise", "batch_size?"]),
        ("engine:\n  rouns: 3\n", ["unknown option engine.rouns", "engine.rounds?"]),
        ("batch_size: many\n", ["batch_size must be int, got many"]),
        ("batch_size: [1\n", ["config"]),
        ("task: painting\n", ["task", "painting"]),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(
    text: str, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text(text)
    line = complaint_of(capsys, ["--config", str(tmp_path / "my.yaml")])
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            ["--engine.bandit.policy", "discounted_tompson"],
            "bandit.policy: unknown policy 'discounted_tompson'; did you",
        ),
        (
            ["--engine.bandit.policy", "discounted_thompson", "--engine.bandit.options", "{gama: 0.5}"],
            "bandit.options.gama is no hyper-parameter of discounted_thompson",
        ),
        (["--engine.reward.clip", "0"], "reward.clip must be positive, got 0"),
        (["--engine.objective.attention_heads", "relation"], "objective.relation_heads must be given"),
    ],
)
def test_what_is_wrong_with_an_option_is_said_before_anything_is_made(
    option: list[str], words: str, brief: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert words in complaint_of(capsys, [*brief, "--run", str(tmp_path / "run"), *option])
    assert not (tmp_path / "run").exists()


def test_what_is_found_wrong_late_still_leaves_the_directory_empty(
    brief: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    option = ["--engine.bandit.policy", "fixed_arm", "--engine.bandit.options", "{arm: 9}"]
    line = complaint_of(capsys, [*brief, "--run", str(tmp_path / "run"), *option])
    assert "arm must be in [0, 2] with 3 arms, got 9" in line
    assert not list(tmp_path.iterdir()), "the corrected command must be able to take the same directory"


def test_a_wrong_model_is_one_line(
    brief: list[str], teacher_file: Path, student_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "truncated.safetensors").write_bytes(teacher_file.read_bytes()[:5000])
    save_file({"weights": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    run = ["--run", str(tmp_path / "run")]
    for name, words in (
        ("missing", "does not exist"),
        ("truncated", "no readable safetensors"),
        ("foreign", "is not an OPTIMA CoCa model"),
    ):
        for role in ("--teacher", "--student"):
            line = complaint_of(capsys, [*brief, *run, role, str(tmp_path / f"{name}.safetensors")])
            assert words in line
            assert f"{name}.safetensors" in line
    line = complaint_of(capsys, [*brief, *run, "--teacher", str(student_file), "--task", "vqa"])
    assert "no head for vqa" in line
    assert str(student_file) in line
    line = complaint_of(capsys, [*brief, *run, "--teacher", str(student_file), "--student", str(teacher_file)])
    assert "2 student layers cannot learn from 1 teacher layers" in line


def test_a_run_directory_that_cannot_be_used_is_one_line(
    brief: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for command in (brief, ["pretrain"]):
        assert "cannot be written to" in complaint_of(capsys, [*command, "--run", str(tmp_path / "file")])
        assert "cannot be written to" in complaint_of(capsys, [*command, "--run", str(tmp_path / "file" / "run")])
        line = complaint_of(capsys, [*command, "--run", str(tmp_path / "full")])
        assert "is not empty" in line
        assert "--resume" in line
        line = complaint_of(capsys, [*command, "--run", str(tmp_path / "full"), "--resume"])
        assert "no run to resume" in line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def field_names(config: type, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            names += field_names(type(default), f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_explains_every_field(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help-all"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name in field_names(COMMANDS[command].config()):
        starts = [i for i, line in enumerate(lines) if line.strip().startswith(f"--{name} ")]
        assert starts, f"--{name} is not in the help"
        shown = " ".join(line.strip() for line in lines[starts[0] : starts[0] + 2])
        explanation = re.split(r"\((?:required|type|default)", shown.removeprefix(f"--{name} "))[0].split(maxsplit=1)[
            1:
        ]
        assert len("".join(explanation)) > 8, f"--{name} is not explained: {lines[starts[0]]}"


def test_help_shows_the_options_that_matter(capsys: pytest.CaptureFixture[str]) -> None:
    for command, about in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = set(re.findall(r"^ +--([\w.]+)", capsys.readouterr().out, re.MULTILINE)) - {"config", "help"}
        assert len(shown) <= 20, command
        if about.matter:
            assert set(about.matter) <= shown, command
            assert len(about.matter) <= 14


def test_help_names_policies_and_presets_and_no_classes(capsys: pytest.CaptureFixture[str]) -> None:
    told = ""
    for command in ("distill", "import"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told += capsys.readouterr().out
    words = set(re.findall(r"[\w-]+", told))
    assert {*POLICIES, *TEACHERS} <= words
    assert "<class" not in told


def test_help_without_a_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def printed_config(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_printed_config_is_resolved_and_can_be_fed_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    changes = ["--task", "vqa", "--engine.rounds", "7", "--engine.bandit.options", "{gamma: 0.5}", "--teacher", "t.st"]
    printed = printed_config(capsys, changes)
    values = yaml.safe_load(printed)
    assert values["task"] == "vqa"
    assert values["engine"]["rounds"] == 7
    assert values["engine"]["bandit"]["options"] == {"gamma": 0.5}
    assert values["batch_size"] == DistillConfig().batch_size
    (tmp_path / "again.yaml").write_text(printed)
    assert printed_config(capsys, ["--config", str(tmp_path / "again.yaml")]) == printed
    overridden = yaml.safe_load(printed_config(capsys, ["--config", str(tmp_path / "again.yaml"), "--task", "nlvr2"]))
    assert overridden == values | {"task": "nlvr2"}


def test_shipped_recipes_are_found_by_name_and_valid(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pretrain_teacher", "pretrain_student"):
        values = yaml.safe_load(printed_config(capsys, ["pretrain", "--config", name]))
        assert values["model"] != dataclasses.asdict(PretrainConfig().model)
        assert yaml.safe_load(printed_config(capsys, ["pretrain", f"--config={name}"])) == values


def test_a_mistake_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "optima.run", "--bach_size", "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr == "optima: unknown option bach_size; did you mean batch_size?\n"
    assert found.stdout == ""


def test_doctor_tells_what_is_found_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("Python", "torch", "CPU threads", "GPU", "Triton", "flash-attn", "apex", "DALI"):
        assert name in text
    assert torch.__version__ in text


def test_a_long_name_of_a_config_is_shown_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint_of(capsys, ["watch", "--config", "d/" * 2500])
    assert line.startswith("optima: config d/d/d/")
    assert len(line) < 1000
