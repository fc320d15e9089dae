"""The page of runs on a GPU: the last of every item, groups of random problems as one line, earlier code marked."""

from typing import Any

from bench.gpu.page import compact, named
from bench.gpu.tables import markdown

ABOUT = {"device": "A GPU", "versions": {"torch": "2.11"}, "date": "2026-01-01", "ptxas": "12.8", "driver": "580"}


def line(part: str, group: str, item: str, ok: bool = True, code: str = "first", **rest: Any) -> dict[str, Any]:
    return {"part": part, "group": group, "item": item, "ok": ok, "code": code} | rest


def run(code: str, wrong: bool) -> list[dict[str, Any]]:
    return [
        line("correctness", "about", "versions", code=code, about=ABOUT),
        line("correctness", "linear", "linear #0", code=code, error=1e-3),
        line("correctness", "linear", "linear #1", not wrong, code, error="off by one" if wrong else 2e-3),
        line("correctness", "linear", "(group)", code=code, left=""),
        line("kernels", "linear", "linear 2048 | optima", code=code, graph=0.5, wall=0.75, host=0.25, tflops=400.0),
    ]


def test_random_problems_of_a_group_are_one_line_with_what_is_wrong() -> None:
    kept = compact(run("first", wrong=True))
    (group,) = (each for each in kept if "of" in each)
    assert (group["right"], group["of"], group["error"]) == (1, 2, 1e-3)
    assert [each["item"] for each in kept if not each["ok"]] == ["(group)", "linear #1"]
    text = markdown([kept])
    assert "- linear, linear #1: off by one" in text
    assert "| linear | 1 | 2 | 1.0e-03 |" in text
    assert "| linear 2048 | optima | 0.500 | 0.750 | 0.250 | 400 |" in text


def test_what_is_kept_stays_as_it_is_without_new_lines() -> None:
    kept = compact(run("first", wrong=True))
    assert sorted(map(str, compact(kept))) == sorted(map(str, kept))


def test_later_runs_replace_earlier_ones() -> None:
    kept = compact([*compact(run("first", wrong=True)), *run("second", wrong=False)])
    assert all(each["ok"] for each in kept)
    assert {each["code"] for each in kept} == {"second"}
    assert "Nothing was wrong." in markdown([kept])


def test_rows_of_earlier_code_are_marked() -> None:
    first = [*run("first", wrong=False), line("kernels", "hidden", "hidden | optima", graph=1.0, wall=2.0)]
    text = markdown([compact([*first, *run("second", wrong=False)])])
    assert "| hidden * | optima | 1.000 |" in text
    assert "| linear 2048 | optima |" in text


def test_every_card_has_a_section_with_its_commit_and_remarks() -> None:
    machine = ABOUT | {"device": "B GPU", "date": "2026-02-01"}
    other = [each | ({"about": machine} if "about" in each else {}) for each in run("x", wrong=False)]
    text = markdown([compact(named(run("first", wrong=False), "abc1234", "All of it in one call.")), compact(other)])
    assert text.index("## B GPU, commit unknown") < text.index("## A GPU, commit abc1234")
    assert "All of it in one call." in text


def test_a_peer_that_is_ahead_is_named_and_a_bound_is_not() -> None:
    timed = [
        line("kernels", "linear", "linear 2048 | compiled", graph=0.4, wall=0.9, extra_mib=100.0),
        line("kernels", "linear", "linear 2048 | eager", graph=2.0, wall=2.0, extra_mib=500.0),
        line("kernels", "linear", "linear 2048 | four products", graph=0.1, wall=0.1, extra_mib=0.0),
    ]
    ours = run("first", wrong=False)
    ours[-1]["extra_mib"] = 50.0
    text = markdown([compact([*ours, *timed])])
    ahead = text.partition("### Where another is ahead")[2].partition("###")[0]
    assert "- linear 2048, GPU: compiled 0.400; ours 0.500 ms" in ahead
    assert ahead.count("linear 2048") == 1
    assert "| 0.100 |" in next(row for row in text.splitlines() if row.startswith("| linear 2048 | optima |"))


def test_what_there_was_no_time_for_is_called_not_measured() -> None:
    text = markdown([compact(run("first", wrong=False))]).partition("### Not measured here")[2].partition("###")[0]
    assert "linear 8192 x 128256 | optima" in text
    assert "attention kl bool | optima" in text
