"""Comparisons of models of transformers: which methods there are, what runs, how losses are ranked, what is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

hf = pytest.importorskip("transformers", reason="pip install 'optima-distill[hf]'")
pytest.importorskip("datasets", reason="pip install 'optima-distill[hf]'")

from tiny_hf import SIZES, question, write_llama, write_rows  # noqa: E402

from optima.commands.compare.methods import methods_of_models  # noqa: E402
from optima.commands.compare.runs import Asked, Cell, Comparison, run_command  # noqa: E402
from optima.commands.distill_hf.config import DistillHfConfig  # noqa: E402
from optima.commands.parse import parse  # noqa: E402
from optima.run import main  # noqa: E402
from optima.runs.directory import flat  # noqa: E402
from optima.runs.reading import read_rounds, read_summary  # noqa: E402
from optima.runs.rows import plain  # noqa: E402


def settings(root: Path, make: Callable[[int], Any]) -> DistillHfConfig:
    """Of a teacher of 2 layers and a student of 1, of which there are configurations alone."""
    for name, layers in (("teacher", 2), ("student", 1)):
        config = make(layers)
        config.save_pretrained(root / name)
    return DistillHfConfig(teacher=str(root / "teacher"), student=str(root / "student"), data=root / "rows.jsonl")


def clip(layers: int) -> Any:
    sizes = SIZES | {"num_hidden_layers": layers}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    return hf.CLIPConfig(text_config=sizes | {"vocab_size": 20}, vision_config=vision, architectures=["CLIPModel"])


def bert(kind: str) -> Callable[[int], Any]:
    return lambda layers: hf.BertConfig(**SIZES, num_hidden_layers=layers, vocab_size=20, architectures=[kind])


BALANCED = ("linear_thompson", "optima")
FIXED = ("all_modules_at_10", "all_modules_at_30", "all_modules_at_100")
LOSSES = ("task_loss", "task_loss_and_logits")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (clip, {*LOSSES, *FIXED, "only_text", "only_vision", "round_robin", "uniform_subset", *BALANCED}),
        (bert("BertForMaskedLM"), {LOSSES[1], *FIXED, *BALANCED}),
        (bert("BertModel"), {*FIXED, *BALANCED}),
    ],
    ids=["own loss, two modules", "predictions alone", "layers alone"],
)
def test_methods_are_those_that_the_models_have(make: Callable[[int], Any], expected: set[str], tmp_path: Path) -> None:
    assert set(methods_of_models(settings(tmp_path, make))) == expected


def test_a_method_differs_from_optima_in_its_own_options_alone(tmp_path: Path) -> None:
    shared = settings(tmp_path, clip)
    methods = methods_of_models(shared)
    values = plain(shared)
    for name in ("run", "seed", "quiet", "resume"):
        values.pop(name)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    comparison = Comparison(tmp_path, Asked(("transformers",), (), 1, ""), "distill_hf", shared, methods)
    resolved = {}
    for method in methods:
        words = run_command(comparison, Cell("transformers", method, 3))
        _, config = parse(words[words.index("distill_hf") :])
        assert (config.seed, config.teacher) == (3, shared.teacher)
        resolved[method] = flat(plain(config) | {"run": None})
    optima = resolved.pop("optima")
    for method, ours in resolved.items():
        differing = {name for name in ours | optima if ours.get(name) != optima.get(name)}
        asked = {name for name, value in methods[method].items() if value != {}}
        assert differing, method
        assert all(name.startswith(tuple(asked)) for name in differing), method


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """A comparison of two methods whose runs take some seconds each."""
    shared = {
        "teacher": write_llama(tmp_path / "teacher", 3),
        "student": write_llama(tmp_path / "student", 2, weights=False),
        "data": write_rows(tmp_path / "rows.jsonl", question),
        "engine.rounds": 3, "engine.steps_per_round": 2, "engine.optimiser.learning_rate": 1e-2,
        "batch_size": 4, "probe_size": 3, "threads": 1,
    }  # fmt: skip
    words = ["compare_hf", "--run", str(tmp_path / "runs"), "--method", "optima,task_loss"]
    return words + [word for name, value in shared.items() for word in (f"--distill.{name}", str(value))]


def test_a_comparison_ranks_the_losses_of_its_runs_and_goes_on(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    assert main([*options, "--seeds", "1"]) == 0
    first = root / "transformers" / "optima" / "seed-0" / "summary.json"
    written = first.stat().st_mtime_ns
    assert main([*options, "--seeds", "2", "--jobs", "2"]) == 0
    assert first.stat().st_mtime_ns == written
    said = capsys.readouterr().out
    assert "2/2  transformers  " in said
    assert "seed 1: task loss " in said
    assert "Student before" in said
    cells = [[root / "transformers" / method / f"seed-{seed}" for seed in (0, 1)] for method in ("optima", "task_loss")]
    means = [sum(read_summary(cell / "summary.json").scores["after"]["task"] for cell in own) / 2 for own in cells]
    table = (root / "comparison.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith(("| optima", "| task loss"))]
    places = {line.split("|")[1].strip(): i for i, line in enumerate(lines)}
    assert places["optima" if means[0] < means[1] else "task loss"] == 0
    for name, mean in zip(("optima", "task loss"), means, strict=True):
        assert f"| {name} | {mean:.3f} ±" in table
    assert all(round_.modules == ("language",) for round_ in read_rounds(cells[0][0] / "metrics.jsonl"))
    assert "hidden/language" not in read_summary(cells[1][0] / "summary.json").scores["after"]
    page = (root / "comparison.html").read_text()
    assert 'href="transformers/optima/seed-1/report.html"' in page
    assert "a lower loss is better" in page

    (root / "comparison.html").unlink()
    assert main(["report", str(root)]) == 0
    assert (root / "comparison.html").read_text() == page
    assert main([*options, "--distill.batch_size", "6"]) == 2
    assert "distill.batch_size 4, now it is 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "optima,only_vision"], "method must be among task_loss, .*, got only_vision"),
        (["--method", "task_loss"], "method must include optima"),
        (["--distill.teacher", "nowhere"], "teacher nowhere cannot be loaded"),
        (["--distill.push_to_hub", "a/b"], "distill.push_to_hub must be null"),
        (["--distill.modules", "vision"], "optima seed 0 failed: .*no module 'vision' in both models"),
    ],
)
def test_mistakes_are_told_in_a_line(
    words: list[str], message: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, *words]) == 2
    assert re.search(message, line := capsys.readouterr().err), line
    assert line.count("\n") == 1
