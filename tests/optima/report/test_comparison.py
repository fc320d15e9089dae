"""Methods against OPTIMA over seeds: the table, its honest conclusion, and the page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from page_reader import Page

from optima.report.comparison import Outcome, conclusion, markdown, method_rows, write_comparison

NOISE = (0.0, 1.1, -0.8, 0.6, -0.9)
WOBBLE = (0.4, -0.5, 0.1, 0.3, -0.3)


def outcomes(**means: float) -> list[Outcome]:
    """Five seeds a method; seeds share their noise, and each method but optima wobbles around its mean."""
    return [
        Outcome(
            "captioning", method, seed, mean + NOISE[seed] + (method != "optima") * WOBBLE[seed], 100.0 + seed, 1000.0
        )
        for method, mean in means.items()
        for seed in range(5)
    ]


def test_methods_are_ranked_and_judged_by_paired_differences() -> None:
    rows = method_rows(outcomes(optima=70.0, uniform=65.0, everything=75.0, twin=70.05))["captioning"]
    assert [row.method for row in rows] == ["everything", "twin", "optima", "uniform"]
    assert [row.verdict for row in rows] == ["better", "not told apart", "", "worse"]
    assert rows[3].difference is not None
    assert rows[3].difference.mean == pytest.approx(-5.0)


def test_intervals_of_differences_widen_with_the_number_of_comparisons() -> None:
    methods = {f"m{i}": 60.0 for i in range(5)}
    for others, quantile in ((1, 2.7764), (5, 4.6041)):  # of Student's T of 4 degrees, two-sided 95 % and 99 %
        rows = method_rows(outcomes(optima=70.0, **dict(list(methods.items())[:others])))["captioning"]
        for row in rows:
            scores = list(row.scores.values())
            assert row.score.half_width == pytest.approx(2.7764 * standard_error(scores), rel=1e-4)
            if row.difference is not None:
                assert row.difference.half_width == pytest.approx(quantile * standard_error(WOBBLE), rel=1e-4)


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        (
            {"optima": 70.0, "uniform": 60.0, "everything": 80.0},
            "optima does not win: everything does better; optima is better than uniform.",
        ),
        ({"optima": 70.0, "uniform": 60.0, "fixed": 50.0}, "optima is better than every other method."),
        (
            {"optima": 70.0, "uniform": 60.0, "twin": 70.0},
            "optima is better than uniform; the others cannot be told apart",
        ),
        ({"optima": 70.0, "twin": 70.0}, "No method can be told apart from optima."),
    ],
)
def test_conclusion_says_what_the_intervals_say(means: dict[str, float], expected: str) -> None:
    assert conclusion(method_rows(outcomes(**means))["captioning"]).startswith(expected)


def test_several_tasks_have_their_mean_as_one_more() -> None:
    captions = outcomes(optima=70.0, uniform=60.0, only_here=50.0)
    answers = [replace(o, task="vqa", score=o.score / 2) for o in captions if o.method != "only_here" and o.seed != 3]
    assert "mean_of_tasks" not in method_rows(captions)
    rows = {row.method: row for row in method_rows([*captions, *answers])["mean_of_tasks"]}
    assert set(rows) == {"optima", "uniform"}
    assert rows["optima"].scores == {seed: pytest.approx(0.75 * (70.0 + NOISE[seed])) for seed in (0, 1, 2, 4)}


def test_markdown_holds_a_line_a_method() -> None:
    text = markdown(outcomes(optima=70.0, uniform_random=60.0))
    assert "| optima | 70.0 ±\N{NO-BREAK SPACE}1.1 | – |  | 5 | 1 min 42 s | 1000 MiB |" in text
    assert "| uniform random | 60.0 ±" in text
    assert "| −10.0 ±\N{NO-BREAK SPACE}0.5 | worse |" in text


def losses(**means: float) -> list[Outcome]:
    """The same as losses of some hundredths, of which a lower one is better."""
    held = "held-out rows"
    return [replace(o, score=o.score / 1000, loss="task", scored_on=held) for o in outcomes(**means)]


def test_of_losses_the_lower_is_the_better() -> None:
    found = losses(optima=70.0, uniform=65.0, everything=75.0, twin=70.05)
    rows = method_rows(found)["captioning"]
    assert [row.method for row in rows] == ["uniform", "optima", "twin", "everything"]
    assert [row.verdict for row in rows] == ["better", "", "not told apart", "worse"]
    assert conclusion(rows) == "optima does not win: uniform does better; optima is better than everything."


def test_losses_are_told_with_the_digits_that_they_have(tmp_path: Path) -> None:
    found = losses(optima=70.0, uniform=65.0)
    text = markdown(found)
    assert "| method | task loss | against optima |" in text
    assert "| uniform | 0.06500 ±\N{NO-BREAK SPACE}0.00112 | −0.00500 ±\N{NO-BREAK SPACE}0.00048 | better |" in text
    assert found[0].said == "task loss 0.0700"
    page = Page(write_comparison(found, tmp_path / "comparison.html")).text
    assert "Mean over seeds on the held-out rows (memory: the largest), best first: a lower loss is better." in page
    assert "%" not in page.partition("Intervals of scores are 95%")[2]
    more = markdown([replace(o, score=100 * o.score) for o in found])
    assert "| optima | 7.000 ±" in more


def test_page_stands_alone_and_shows_the_table(tmp_path: Path) -> None:
    path = write_comparison(
        outcomes(optima=70.0, uniform=60.0), tmp_path / "comparison.html", command="run <this> & that"
    )
    page = Page(path)
    assert "−10.0 ± 0.5 worse" in page.text
    assert "run <this> & that" in page.text
    assert [address for address in page.references if not address.startswith(("data:", "#"))] == []


def test_an_interval_wider_than_the_scores_is_drawn_within_them(tmp_path: Path) -> None:
    """Two seeds that lie 40 points apart have an interval from -194 to 314 %."""
    found = [
        Outcome("captioning", method, seed, 40.0 + 40 * seed, 1.0, 1.0)
        for method in ("optima", "uniform")
        for seed in (0, 1)
    ]
    page = Page(write_comparison(found, tmp_path / "comparison.html"))
    ticks = [int(text) for text in map(str.strip, page.words) if re.fullmatch(r"\d+", text)]
    assert {0, 100} <= set(ticks)
    assert max(ticks) == 100
    assert not any(re.fullmatch(r"[−-]\d+", text.strip()) for text in page.words)


def test_missing_reference_and_repeated_seeds_are_named() -> None:
    with pytest.raises(ValueError, match="no outcome of 'optima' on task 'captioning'; there are uniform"):
        method_rows(outcomes(uniform=50.0))
    with pytest.raises(ValueError, match="method 'optima' has a seed twice"):
        method_rows(outcomes(optima=50.0) * 2)
