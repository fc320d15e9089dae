"""Several runs on one page."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from page_reader import Page
from synthetic_run import edit_json, write_run

from optima.report import write_side_by_side


@pytest.fixture
def pair(written: Path, tmp_path: Path) -> list[Path]:
    """Two runs that differ in a configuration key and in what the student says of the first sample."""
    first, second = (Path(shutil.copytree(written, tmp_path / name)) for name in ("optima", "uniform"))
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("gamma: 0.9", "gamma: 0.75"))
    edit_json(first / "samples.json", lambda rows: rows[0].update(after="only one gets it right"))
    edit_json(first / "samples.json", lambda rows: rows[0]["correct"].update(after=True))
    edit_json(second / "samples.json", lambda rows: rows[0]["correct"].update(after=False))
    return [first, second]


def test_comparison_shows_each_run_and_refers_to_nothing_outside(pair: list[Path], tmp_path: Path) -> None:
    page = Page(write_side_by_side(pair, tmp_path / "deep" / "page.html"))
    assert "2 runs side by side" in page.text
    assert all(name in page.text for name in ("optima", "uniform"))
    assert [address for address in page.references if not address.startswith(("data:", "#"))] == []
    assert page.all("script") == []


def test_a_name_leads_to_the_runs_own_report(pair: list[Path], tmp_path: Path) -> None:
    (pair[0] / "report.html").write_text("its report")
    runs = [pair[0], Path(shutil.move(pair[1], tmp_path / "a run & more"))]
    (runs[1] / "report.html").write_text("another")
    output = tmp_path / "deep" / "page.html"
    links = [found["href"] for found in Page(write_side_by_side(runs, output)).all("a")]
    assert [(output.parent / unquote(link)).resolve() for link in links] == [run / "report.html" for run in runs]


def test_only_differing_configuration_is_listed(pair: list[Path], tmp_path: Path) -> None:
    text = Page(write_side_by_side(pair, tmp_path / "page.html")).text
    assert "policy.gamma 0.9 0.75" in text
    assert "steps_per_round" not in text


def test_samples_the_students_disagree_on_are_shown(pair: list[Path], tmp_path: Path) -> None:
    page = Page(write_side_by_side(pair, tmp_path / "page.html"))
    assert "only one gets it right" in page.text
    assert len(page.all("img")) == 1


def test_runs_of_one_name_are_told_apart_by_their_parents(written: Path, tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(written, tmp_path / parent / "run")) for parent in ("x", "y")]
    text = Page(write_side_by_side(runs, tmp_path / "page.html")).text
    assert "x/run" in text
    assert "y/run" in text


def test_runs_of_different_tasks_share_losses_but_no_score_curve(written: Path, tmp_path: Path, seed: int) -> None:
    other = write_run(tmp_path / "pairs", seed=seed, rounds=5, task="nlvr2", samples=1)
    labels = [svg["aria-label"] for svg in Page(write_side_by_side([written, other], tmp_path / "c.html")).all("svg")]
    assert any("task, logits" in label for label in labels)
    assert not any("score" in label for label in labels)


def test_a_curve_of_one_point_is_seen(pair: list[Path], tmp_path: Path) -> None:
    for run in pair:
        edit_json(run / "summary.json", lambda summary: summary.update(learning_curve=summary["learning_curve"][:1]))
    before, after = (
        Page(write_side_by_side(runs, tmp_path / "page.html")).source.count("<use")
        for runs in ([pair[0], write_run(tmp_path / "other", task="nlvr2", samples=1)], pair)
    )
    assert after >= before + 4  # a point of either run, on the wide drawing and on the narrow one


def test_one_run_is_no_comparison(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_dirs: 1 given"):
        write_side_by_side([written], tmp_path / "page.html")
