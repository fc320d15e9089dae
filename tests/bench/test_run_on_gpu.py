"""The command for a rented GPU: what goes wrong is named, costs nothing else, and is not repeated."""

import time
from pathlib import Path

import pytest

from bench import run_on_gpu
from bench.gpu import lines
from bench.gpu.plan import GROUPS, PARTS, Group
from bench.gpu.summary import summary


def group(name: str, seconds: float = 30, tool: tuple[str, ...] = ()) -> Group:
    return Group("planted_items", name, seconds, tool=tool, package="")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> run_on_gpu.Runner:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return run_on_gpu.Runner(tmp_path, "a code", 0, True, time.monotonic() + 300)


def verdicts(runner: run_on_gpu.Runner) -> dict[str, bool]:
    return {item: line["ok"] for (_, _, item), line in lines.of_code(runner.out, runner.code).items()}


def test_a_group_that_is_right_is_not_done_again(runner: run_on_gpu.Runner) -> None:
    runner.run(group("all right"))
    assert verdicts(runner) == {"0 right": True, "1 right": True, lines.GROUP: True}
    runner.run(group("all right"))
    items = [line["item"] for line in lines.read(runner.out)]
    assert items.count("0 right") == 1
    assert summary(runner.out, runner.code, [group("all right")])[1] == 0


def test_other_code_is_tried_anew(runner: run_on_gpu.Runner) -> None:
    runner.run(group("all right"))
    text, status = summary(runner.out, "another code", [group("all right")])
    assert status == 3
    assert "all right: never ran" in text


@pytest.mark.parametrize(
    ("name", "item", "words"),
    [
        ("one wrong", "1 wrong", "off by one"),
        ("a fault", "1 faults", "illegal memory access"),
        ("a death", "1 dies", "died with status 139"),
    ],
)
def test_what_goes_wrong_is_named_and_the_rest_goes_on(
    runner: run_on_gpu.Runner, name: str, item: str, words: str
) -> None:
    runner.run(group(name))
    assert verdicts(runner) == {"0 right": True, item: False, "2 right": True, lines.GROUP: True}
    text, status = summary(runner.out, runner.code, [group(name)])
    assert status == 1
    assert any(item in line and words in line for line in text.splitlines() if line.startswith("WRONG"))


def test_an_item_without_end_is_ended_and_named(runner: run_on_gpu.Runner) -> None:
    runner.run(group("no end", seconds=8))
    assert verdicts(runner)["1 never_ends"] is False
    assert verdicts(runner)["2 right"] is True


def test_a_group_whose_needs_are_missing_is_wrong(runner: run_on_gpu.Runner) -> None:
    runner.run(group("not there"))
    text, status = summary(runner.out, runner.code, [group("not there")])
    assert status == 1
    assert "a_package_that_is_not_there" in text


def test_what_time_does_not_allow_is_missing_and_done_by_the_next_call(runner: run_on_gpu.Runner) -> None:
    runner.run(group("slow", seconds=2))
    text, status = summary(runner.out, runner.code, [group("slow")])
    assert (status, "MISSING slow: " in text) == (3, True)
    runner.run(group("slow"))
    assert summary(runner.out, runner.code, [group("slow")])[1] == 0


def test_without_time_nothing_runs(tmp_path: Path) -> None:
    late = run_on_gpu.Runner(tmp_path, "a code", 0, True, time.monotonic())
    late.run(group("all right"))
    assert summary(tmp_path, "a code", [group("all right")])[1] == 3


def test_a_tool_that_is_not_there_is_noted(runner: run_on_gpu.Runner) -> None:
    runner.run(group("all right", tool=("no-such-sanitizer",)))
    text, status = summary(runner.out, runner.code, [group("all right")])
    assert (status, "no-such-sanitizer is not installed" in text) == (0, True)


def test_every_group_of_the_plan_is_there() -> None:
    from importlib import import_module

    assert {group.part for group in GROUPS} == set(PARTS)
    for planned in GROUPS:
        assert planned.name in import_module(f"bench.gpu.{planned.part}").GROUPS


def test_the_command_rehearses_from_a_plain_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    arguments = [
        "run_on_gpu.py",
        "--rehearse",
        "--part",
        "correctness",
        "kernels",
        "--out",
        str(tmp_path),
        "--jobs",
        "1",
    ]
    monkeypatch.setattr("sys.argv", [*arguments, "--group", "about", "hidden", "strategies-hidden", "ceilings"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert run_on_gpu.main() == 0
    found = lines.of_code(tmp_path, lines.digest())
    assert {"versions", "hidden #0", "hidden example 1", "copy"} <= {item for _, _, item in found}
