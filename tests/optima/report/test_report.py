"""The page of one run: it stands alone, shows what the run left, and leaves out what it did not leave."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from page_reader import Page
from PIL import Image
from synthetic_run import edit_json, loss_names, write_json, write_run

from optima.report import plots, write_report
from optima.report.svg import Layout
from optima.runs.reading import read_run
from optima_core import OptimaError


def test_page_refers_to_nothing_outside_itself(page: Page) -> None:
    assert page.references
    assert [address for address in page.references if not address.startswith(("data:", "#"))] == []
    assert page.all("script") == []
    assert "://" not in page.source


def test_page_forbids_the_browser_to_fetch(page: Page) -> None:
    policies = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]


def test_report_is_written_into_the_run_directory_and_is_the_same_twice(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    first = path.read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_headline_table_and_cost_are_shown(run_dir: Path) -> None:
    def known(summary: dict) -> None:
        summary["scores"] = {
            "teacher": {"scene_accuracy": 80.0, "loss": 0.25},
            "before": {"scene_accuracy": 10.0, "loss": 2.25},
            "after": {"scene_accuracy": 60.0, "loss": 0.75},
        }

    edit_json(run_dir / "summary.json", known)
    text = Page(write_report(run_dir)).text
    for expected in (
        "The student reaches 75% of its teacher",
        "10.0% → 60.0%",
        "scene accuracy 80.0% 10.0% 60.0% 71%",
        "loss 0.250 2.25 0.750 75%",
        "5.3×",
        "601k of 3.21M parameters",
        "3.2×",
        "1.36 GiB",
        "4 min 04 s",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("after", "expected"),
    [(10.0, "did not raise"), (0.5, "did not raise"), (90.0, "caught up"), (40.0, "reaches 50% of its teacher")],
)
def test_headline_is_honest_about_the_outcome(run_dir: Path, after: float, expected: str) -> None:
    def outcome(summary: dict) -> None:
        for model, value in (("teacher", 80.0), ("before", 10.0), ("after", after)):
            summary["scores"][model]["scene_accuracy"] = value

    edit_json(run_dir / "summary.json", outcome)
    assert expected in Page(write_report(run_dir)).text


def test_command_and_configuration_are_shown_verbatim(page: Page, written: Path) -> None:
    assert json.loads((written / "summary.json").read_text())["command"] in page.text
    assert " ".join((written / "config.yaml").read_text().split()) in page.text


def test_every_round_stands_in_the_table_of_rounds(page: Page, written: Path) -> None:
    rows = [json.loads(line) for line in (written / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert f"{row['round']} {row['step']} {row['modules'][0].replace('_', ' ')}" in page.text


def test_plots_have_labels_for_readers_who_cannot_see_them(page: Page) -> None:
    labels = [svg.get("aria-label", "") for svg in page.all("svg")]
    assert len(labels) == 6, "timeline, heat map and learning curves, each for wide and narrow windows"
    assert all(svg["role"] == "img" for svg in page.all("svg"))
    assert all(labels)
    assert all(any(name in label for label in labels) for name in loss_names())
    assert all(image["alt"] for image in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_the_timeline_shows_how_strongly_and_at_what_weight_modules_were_distilled(written: Path) -> None:
    rounds = read_run(written).rounds
    chosen, weights, *_ = plots.timeline(rounds, Layout(980, compact=False)).axes
    drawn = {round(path.get_extents().height, 6) for bars in chosen.collections for path in bars.get_paths()}
    full = 0.72
    assert drawn == {round(full * share, 6) for share in (1, 3 / 4, 2 / 4)}
    assert weights.get_yscale() == "log"
    lines = {tuple(line.get_ydata()[np.isfinite(line.get_ydata())]) for line in weights.lines}
    expected = {
        tuple(r.weights[f"{kind}/{module}"] for r in rounds if module in r.modules)
        for module in plots.modules_of(rounds)
        for kind in ("hidden", "attention")
    }
    assert lines == expected


def test_colours_come_from_the_style_sheet_so_that_both_themes_fit(page: Page) -> None:
    drawn = " ".join(
        attributes.get("style", "") for tag, attributes in page.elements if tag in ("path", "g", "use", "text")
    )
    assert "var(--arm-0)" in drawn
    assert "var(--heat-" in drawn
    assert "#" not in drawn.replace("url(#", "")
    assert page.source.count("prefers-color-scheme: dark") == 1


def test_ids_are_unique_although_many_drawings_share_the_page(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = {reference.removeprefix("#") for reference in page.references if reference.startswith("#")}
    assert used <= set(ids)
    assert [identity for identity in used if ids.count(identity) > 1] == []


INJECTION = "<script>alert('x')</script>\"><img src=http://evil.example/x.png onerror=alert(1)> & {{ 7 * 7 }} $\\frac$"


def test_markup_in_captions_and_names_stays_text(run_dir: Path) -> None:
    edit_json(
        run_dir / "samples.json", lambda rows: rows[0].update(reference=INJECTION, after=INJECTION, prompt=INJECTION)
    )
    edit_json(
        run_dir / "summary.json", lambda s: s.update(task=INJECTION, command=INJECTION, environment={INJECTION: 1})
    )
    edit_json(run_dir / "cross_attention.json", lambda value: value["caption"].__setitem__(0, INJECTION))
    (run_dir / "config.yaml").write_text(json.dumps({"note": INJECTION}))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["modules"] = [INJECTION]
        row["probe"][f"hidden/{INJECTION.replace('/', '')}/0"] = 1.0
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(run_dir))
    assert page.all("script") == []
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert INJECTION in page.text


def test_samples_are_grouped_by_what_distillation_did(run_dir: Path) -> None:
    outcomes = {"better": (False, True), "kept": (True, True), "still": (False, False), "lost": (True, False)}

    def mark(rows: list) -> None:
        del rows[len(outcomes) :]
        for row, (name, (before, after)) in zip(rows, outcomes.items(), strict=True):
            row["correct"].update(before=before, after=after)
            row["reference"] = f"reference {name}"

    edit_json(run_dir / "samples.json", mark)
    text = Page(write_report(run_dir)).text
    titles = ("Changed by distillation", "Right", "Wrong", "Lost by distillation")
    places = [
        text.index(part)
        for title, name in zip(titles, outcomes, strict=True)
        for part in (f"{title} ", f"reference {name}")
    ]
    assert places == sorted(places)


def test_pairs_of_images_are_both_shown(tmp_path: Path, seed: int) -> None:
    path = write_run(tmp_path / "pairs", seed=seed, rounds=4, task="nlvr2", samples=3)
    (path / "cross_attention.json").unlink()
    assert len(Page(write_report(path)).all("img")) == 6


@pytest.mark.parametrize("arms", [[("a",)], [("a",), ("b",), ("a", "b")], [tuple("abcdefghij")]])
def test_any_set_of_arms_can_be_drawn(tmp_path: Path, seed: int, arms: list[tuple[str, ...]]) -> None:
    page = Page(write_report(write_run(tmp_path / "arms", seed=seed, rounds=12, arms=arms, samples=1)))
    assert all(" + ".join(arm) in page.text for arm in arms)


def test_an_arm_of_a_single_round_has_no_spread(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row, arm in zip(rows[:3], ("a", "b", "b"), strict=True):
        row |= {"modules": [arm], "mean": {"a": 0.991, "b": 0.5}, "std": {"a": 5.92e-9, "b": 0.25}}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    text = Page(write_report(run_dir)).text
    assert "0.991 (one round)" in text
    assert "0.500 ± 0.250" in text


def test_a_report_is_replaced_as_a_whole(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run_dir).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OptimaError, match=r"cannot write .*report\.html"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before


def test_one_round_is_enough(tmp_path: Path, seed: int) -> None:
    assert (
        "Arms over 1 round." in Page(write_report(write_run(tmp_path / "short", seed=seed, rounds=1, samples=1))).text
    )


def test_optional_files_and_fields_are_left_out_without_them(run_dir: Path) -> None:
    (run_dir / "samples.json").unlink()
    (run_dir / "cross_attention.json").unlink()
    optional = ("images_per_second", "parameters", "learning_curve", "environment", "command", "peak_mib", "seconds")
    edit_json(run_dir / "summary.json", lambda summary: [summary.pop(name) for name in optional])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    bare = [{key: row[key] for key in ("round", "step", "arm", "modules", "reward")} | {"mean": None} for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    text = Page(write_report(run_dir)).text
    assert "What was distilled when" in text
    for section in ("What the models say", "Where each word looks", "How every loss fell", "Learning curves", "faster"):
        assert section not in text


def test_losses_that_are_not_numbers_leave_gaps(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows[3]["probe"]["task"] = float("nan")
    rows[4]["reward"] = None
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "nan" not in Page(write_report(run_dir)).text.lower()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_missing_required_file_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    with pytest.raises(OptimaError, match=rf"^[^\n]*{name} is missing[^\n]*$"):
        write_report(run_dir)


def test_missing_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptimaError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"round": 2, "step"', "not JSON"),
        ("[1, 2]", "expected an object"),
        (
            '{"round": 2, "step": 60, "arm": 0, "modules": ["a"], "reward": "high"}',
            "'reward' is \"high\", not a number",
        ),
        ('{"round": 2, "arm": 0, "modules": ["a"], "reward": 0.1}', "no 'step'"),
        (
            '{"round": true, "step": 60, "arm": 0, "modules": ["a"], "reward": 0.1}',
            "'round' is true, not a whole number",
        ),
        ('{"round": 2, "step": 60, "arm": 0, "modules": [1], "reward": 0.1}', "not a list of texts"),
        (
            '{"round": 2, "step": 60, "arm": 0, "modules": ["a"], "reward": 0.1, "probe": {"task": "x"}}',
            "'probe': 'task'",
        ),
    ],
)
def test_malformed_round_is_named_with_its_line(run_dir: Path, line: str, complaint: str) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    lines[2] = line
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(OptimaError, match=r"^[^\n]*metrics\.jsonl line 3[^\n]*$") as caught:
        write_report(run_dir)
    assert complaint in str(caught.value)


def test_metrics_without_a_round_are_refused(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("\n")
    with pytest.raises(OptimaError, match="holds no round"):
        write_report(run_dir)


def test_unknown_headline_metric_is_named_with_the_known_ones(run_dir: Path) -> None:
    edit_json(run_dir / "summary.json", lambda summary: summary.update(headline_metric="meteor"))
    with pytest.raises(
        OptimaError, match=r"'meteor' is not among the teacher's scores \(scene_accuracy, kind_accuracy, loss\)"
    ):
        write_report(run_dir)


def test_images_outside_the_run_directory_are_refused(run_dir: Path) -> None:
    (run_dir.parent / "secret.png").write_bytes((run_dir / "samples/000_0.png").read_bytes())
    edit_json(run_dir / "samples.json", lambda rows: rows[0].update(images=["../secret.png"]))
    with pytest.raises(OptimaError, match=r"entry 0: image '\.\./secret\.png' lies outside the run directory"):
        write_report(run_dir)


def test_files_that_are_no_png_are_refused(run_dir: Path) -> None:
    (run_dir / "samples/000_0.png").write_text("<svg/>")
    with pytest.raises(OptimaError, match=r"000_0\.png is not a readable PNG file"):
        write_report(run_dir)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"grid": [3, 8]}, "not 3 rows of 8 numbers"),
        ({"grid": 8}, "'grid' is 8, not a list"),
        ({"caption": ["one"]}, "8 maps for 1 words"),
    ],
)
def test_attention_maps_that_do_not_fit_are_refused(run_dir: Path, change: dict, complaint: str) -> None:
    edit_json(run_dir / "cross_attention.json", lambda value: value.update(change))
    with pytest.raises(OptimaError, match=complaint):
        write_report(run_dir)


def test_attended_part_of_the_image_is_the_bright_one(run_dir: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(run_dir / "white.png")
    left = [[1.0, 0.0]] * 2
    write_json(
        run_dir / "cross_attention.json", {"image": "white.png", "caption": ["x"], "maps": [left], "grid": [2, 2]}
    )
    (run_dir / "samples.json").unlink()
    _, lit = (image["src"] for image in Page(write_report(run_dir)).all("img"))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(lit.split(",")[1]))), dtype=float)
    assert pixels[:, :16].mean() > 240
    assert pixels[:, -16:].mean() < 60
