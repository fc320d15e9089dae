"""The benchmarks at tiny sizes: contenders are equal, a wrong one is caught, and figures come out right."""

import json
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.__main__ import main as bench_main
from bench.harness.contest import Bar, Contest, Sweep, Unavailable
from bench.harness.growth import exponent, grow
from bench.harness.measure import measure, own_memory, prepare
from bench.harness.study import Table
from bench.suites import CONTESTS as SUITES
from bench.suites import STUDIES, attention, bandit, generation, hidden, loaders, logits, suite, whole_step
from optima_core import Step

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]
SIZES = whole_step.Sizes(
    teacher=(4, 32, 4), student=(2, 24, 3), image=32, patch=16, batch=2, classes=8, relation_heads=2
)
CONTESTS = [
    *(attention.contest(CPU, kind, 2, 1, 2, 20, 16) for kind in attention.KINDS),
    *(hidden.contest(CPU, normalize, 2, 30, 16, 24) for normalize in (None, "layernorm")),
    *(logits.linear(CPU, divergence, 20, 100, 16, 24) for divergence in ("forward", "jsd")),
    logits.predictions(CPU, 5, 30),
    *whole_step.contests(CPU, SIZES),
    *bandit.contests(CPU, batch=3),
    loaders.contest(5, (150, 150), 32, batch=3),
    generation.contest(CPU, 64, 1, 40, batch=2, tokens=6),
    generation.contest(CPU, 64, 1, 40, batch=2, tokens=6, beams=3),
]


def uncompiled(contest: Contest) -> Contest:
    """Without the contenders whose compilation takes longer than all else here."""
    return replace(contest, contenders={k: v for k, v in contest.contenders.items() if "compile" not in k})


@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: f"{contest.suite}: {contest.name}")
def test_every_contender_that_is_installed_equals_the_first(contest: Contest) -> None:
    runs, notes = prepare(uncompiled(contest))
    assert "optima" in runs
    assert all(note.startswith(("not installed", "cannot be imported")) for note in notes.values()), notes
    assert all(len(run()) > 0 for run in runs.values())  # again, in the state that the first run left


def contest(**contenders: float) -> Contest:
    return Contest("made up", "constants", {k: lambda v=v: lambda: [torch.tensor(v)] for k, v in contenders.items()})


def test_another_result_is_not_timed_but_named() -> None:
    found = measure(contest(eager=1.0, optima=1.0, wrong=1.1, nan=math.nan), CPU, rounds=1, memory=False)
    assert {name for name, row in found["rows"].items() if "seconds" in row} == {"eager", "optima"}
    assert "another result" in found["rows"]["wrong"]["note"]
    assert "another result" in found["rows"]["nan"]["note"]


def test_a_missing_package_is_named_and_the_others_are_measured() -> None:
    def missing() -> None:
        raise Unavailable("not installed: pip install nothing")

    given = contest(eager=1.0, optima=1.0)
    given = replace(
        given, contenders={**given.contenders, "absent": missing}, bars=(Bar("absent", "eager", "time", 1),)
    )
    found = measure(given, CPU, rounds=1, memory=False)
    assert found["rows"]["absent"]["note"] == "not installed: pip install nothing"
    assert list(report.bars_of(found)) == []


def test_who_takes_less_time_for_the_same_work_is_named() -> None:
    seconds = {"eager": 2.0, "optima": 1.0, "optima, compiled": 0.5, "peer": 0.75, "less work": 0.1}
    rows: dict[str, dict[str, object]] = {name: {"seconds": x} for name, x in seconds.items()}
    found = {"name": "made up", "rows": rows | {"absent": {"note": "not installed"}}, "unequal": ["less work"]}
    assert list(report.ahead_of(found)) == ["AHEAD OF US: made up: peer takes 0.750 of our time"]
    assert list(report.ahead_of({"name": "made up", "rows": {"peer": {"seconds": 1.0}}})) == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_extra_memory_is_what_the_work_needs_beside_its_inputs() -> None:
    inputs = torch.ones(2**23)  # 32 MiB
    extra = own_memory(lambda: [inputs * 2 * 2])["extra"]  # two of its size at once
    assert 60 < extra < 72


def test_exponents_are_those_of_power_laws() -> None:
    assert exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert exponent([1, 2], [1, 2]) is None
    assert exponent([1, 2, 4], [0, 0, 0]) is None


def test_growth_measures_each_contender_up_to_its_largest_size() -> None:
    def square(n: int) -> Contest:
        return replace(contest(eager=1.0, optima=1.0), memory=False)

    found = grow(Sweep("made up", "squares", "N", (1, 2, 4), square, most={"eager": 2}), CPU, rounds=1)
    assert [point["size"] for point in found["points"]["optima"]] == [1, 2, 4]
    assert [point["size"] for point in found["points"]["eager"]] == [1, 2]
    assert found["exponents"]["eager"]["time"] is None


def test_of_a_tree_that_is_not_committed_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "bench").mkdir()
    for name in ("code.py", "bench/RESULTS.md"):
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = report.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "bench/RESULTS.md").write_text("2")
    (tmp_path / "notes").write_text("not tracked")
    assert report.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert report.commit(tmp_path) == clean + "-dirty"

    monkeypatch.setattr(report, "describe", lambda device: {"commit": clean + "-dirty", "device": "any"})
    monkeypatch.setattr("sys.argv", ["bench", "--only", "attention", "--device", "cpu"])
    assert bench_main() == 2
    assert f"{clean}-dirty is no commit to measure again" in capsys.readouterr().err


def test_the_step_that_is_timed_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def spied(name: str) -> Callable[..., Any]:
        inner = getattr(Step, name)

        def spy(*arguments: Any, **named: Any) -> Any:
            taken.append(name)
            return inner(*arguments, **named)

        return spy

    for name in ("losses", "backward", "update", "advance"):
        monkeypatch.setattr(Step, name, spied(name))
    (contest, *_) = whole_step.contests(CPU, SIZES)
    run = contest.contenders["optima"]()
    assert taken == []
    run()
    assert taken == ["losses", "backward", "update", "advance"]


def test_results_are_written_per_machine_and_rendered(tmp_path: Path) -> None:
    given = replace(contest(eager=1.0, optima=1.0), bars=(Bar("optima", "eager", "time", 1e9),))
    found = measure(given, CPU, rounds=1, memory=False)
    path = report.write("made up", report.describe(CPU) | {"clock": "wall"}, tmp_path, contests=[found], growth=[])
    stored = json.loads(path.read_text())
    assert {"date", "device", "versions", "threads"} <= set(stored["about"])
    text = report.markdown(tmp_path)
    assert "| constants | optima |" in text
    assert "met: constants: optima" in text
    assert stored["about"]["date"][:10] in text


def test_a_cpu_told_to_use_fewer_instructions_has_results_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in report.TOLD:
        monkeypatch.delenv(name, raising=False)
    whole = report.describe(CPU)["device"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert report.describe(CPU)["device"] == f"{whole} told ONEDNN_MAX_CPU_ISA=AVX2"


def test_a_studys_page_says_how_it_was_made_and_keeps_what_people_added() -> None:
    about = report.describe(CPU) | {"clock": "wall", "commit": "abc1234"}
    tables = [Table("200 steps", ("start", "score"), [["scratch", "1.0"]])]
    page = report.study_page(suite("starts"), "starts", about, tables, "# T\n\nold\n\n## What it says\n\nA remark.\n")
    assert "| scratch | 1.0 |" in page
    assert "old" not in page
    assert page.endswith("\n## What it says\n\nA remark.\n")
    for fact in ("`python -m bench --only starts`", about["date"][:10], "commit abc1234", about["device"]):
        assert fact in page


@pytest.mark.parametrize("name", [*SUITES, *STUDIES])
def test_every_suite_offers_what_the_command_asks_of_it(name: str) -> None:
    if name == "estimates":
        pytest.importorskip("triton")
    module = suite(name)
    if name in STUDIES:
        assert callable(module.tables)
        assert (ROOT / "bench" / module.PAGE).exists()
    else:
        contests = module.contests(CPU)
        assert contests
        assert {contest.suite for contest in contests} == {name}
        assert len({contest.name for contest in contests}) == len(contests)


@pytest.mark.parametrize("page", sorted((ROOT / "bench").glob("*.md")), ids=lambda page: page.name)
def test_every_page_says_its_command_commit_date_and_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.search(r"`(python|optima) [^`]+`|^    (python|optima) ", text, re.MULTILINE)
    assert re.search(r"commit [0-9a-f]{7}\b", text)
    assert re.search(r"20\d\d-\d\d-\d\d", text)
    assert re.search(r"EPYC|NVIDIA|x86_64", text)
