"""The scripts in lockstep: what they write and print, and the weighings that the engine's balance is compared with."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import branches, choosing
from bench.balances import (
    WEIGHINGS,
    DynamicWeightAverage,
    LossRatio,
    StandardisedTargets,
    UncertaintyWeighting,
)
from optima_core import Objective, ObjectiveConfig
from optima_core.modules import ModulePair

TINY = ["--tasks", "vqa", "--seeds", "0", "--rounds", "2", "--steps", "1", "--items", "4", "--batch_size", "2"]


def call(script: object, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *words])
    threads = torch.get_num_threads()
    try:
        script.main()  # type: ignore[attr-defined]
    finally:
        torch.set_num_threads(threads)


def test_methods_start_alike_and_end_apart_and_are_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.jsonl"
    methods = ["optima", "task_loss_and_logits", *WEIGHINGS]
    options = [*TINY, "--probe_size", "8", "--methods", *methods, "--world", "spoilt_multimodal_decoder"]
    call(choosing, monkeypatch, *options, "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["method"] for row in rows] == methods
    assert {row["world"] for row in rows} == {"spoilt_multimodal_decoder"}
    assert {row["steps"] for row in rows} == {2}
    task = {row["method"]: row["rounds"][0]["losses"]["task"] for row in rows}
    assert len(set(task.values())) == 1
    assert len({row["rounds"][1]["probe"]["logits"] for row in rows}) == len(methods)

    call(choosing, monkeypatch, *options, "--out", str(out))
    assert len(out.read_text().splitlines()) == len(methods)
    capsys.readouterr()
    call(choosing, monkeypatch, "--table", str(out))
    printed = capsys.readouterr().out
    assert all(method.replace("_", " ") in printed for method in methods)


@pytest.mark.parametrize("world", ["teachers_image_encoder", "shipped_start"])
def test_other_starts(world: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "runs.jsonl"
    options = [*TINY, "--probe_size", "4", "--methods", "optima", "--world", world]
    call(choosing, monkeypatch, *options, "--out", str(out))
    (row,) = map(json.loads, out.read_text().splitlines())
    layers = {name for name in row["rounds"][0]["probe"] if name.startswith("hidden/image_encoder/")}
    assert len(layers) == (5 if world == "teachers_image_encoder" else 3)


def test_branches_leave_one_trunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "branches.jsonl"
    call(branches, monkeypatch, *TINY, "--probe_size", "8", "--at", "1", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 7
    assert all(len(row["rounds"]) == 2 and row["rounds"][0] == rows[0]["rounds"][0] for row in rows)
    assert {tuple(row["rounds"][1]["modules"]) for row in rows} == {tuple(row["modules"].split("+")) for row in rows}
    printed = branches.table(out, horizons=(1,))
    assert all(f"| {name} |" in printed for name in branches.REWARDS)
    assert "1 states, 7 branches each" in printed


def test_correlation_of_ranks() -> None:
    assert branches.spearman([1.0, 2.0, 3.0], [10.0, 100.0, 1000.0]) == pytest.approx(1)
    assert branches.spearman([1.0, 2.0, 3.0], [5.0, 4.0, 3.0]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    assert branches.spearman([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert branches.spearman([1.0, 1.0], [1.0, 2.0]) == 0


@pytest.fixture
def objective() -> Objective:
    return Objective([ModulePair("a", 1, 1, 4, 4)], ObjectiveConfig())


def losses(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(seed)
    values = [x.clone().requires_grad_() for x in torch.rand(4) + 0.1]
    return {"task": values[0], "logits": values[1]}, {"hidden/a": values[2], "attention/a": values[3]}


def test_a_ratio_of_losses_makes_every_part_half_of_the_predictions(objective: Objective, seed: int) -> None:
    predictions, layers = losses(seed)
    total = LossRatio(objective, 3).weigh(predictions, layers)
    total.backward()
    predicted = sum(value.item() for value in predictions.values())
    assert total.item() == pytest.approx(2 * predicted)
    for value in layers.values():
        assert float(value.grad) == pytest.approx(0.5 * predicted / float(value))
    assert [float(value.grad) for value in predictions.values()] == [1, 1]


def test_uncertainties_settle_at_the_losses_logarithms(objective: Objective, seed: int) -> None:
    weighing = UncertaintyWeighting(objective, 3)
    predictions, layers = losses(seed)
    for _ in range(400):
        weighing.weigh(predictions, layers).backward()
    for name, value in (predictions | layers).items():
        assert float(weighing.variances[name]) == pytest.approx(math.log(float(value)), abs=0.05)


def test_weights_follow_how_losses_fell_over_two_rounds(objective: Objective) -> None:
    weighing = DynamicWeightAverage(objective, 2)

    def total(*values: float) -> float:
        found = [torch.tensor(float(value)) for value in values]
        return float(weighing.weigh(dict(zip("tl", found[:2], strict=True)), {"h": found[2]}))

    # Means 2, 2, 2 and then 1, 1, 2: ratios of 1/2, 1/2, 1.
    assert [total(1, 2, 3), total(3, 2, 1), total(1, 1, 2), total(1, 1, 2)] == pytest.approx([6, 6, 4, 4])
    weights = [math.exp(0.25), math.exp(0.25), math.exp(0.5)]
    expected = 3 * sum(w * x for w, x in zip(weights, (1, 2, 3), strict=True)) / sum(weights)
    assert total(1, 2, 3) == pytest.approx(expected)


def test_standardised_targets_have_no_unit(objective: Objective, seed: int) -> None:
    from optima_core import Forward
    from optima_core.taps import LayerTap

    torch.manual_seed(seed)
    states = torch.randn(8, 5, 4) * torch.tensor([0.01, 1, 30, 5]) + torch.tensor([3.0, 0, -7, 100])

    def teacher(batch: object, wanted: object) -> Forward:
        return Forward(None, None, {"a": (LayerTap(states),)})

    shown = StandardisedTargets.shown(teacher, None, {"a": (0,)})(None, {"a": (0,)}).taps["a"][0].hidden
    torch.testing.assert_close(shown.mean(dim=(0, 1)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(shown.std(dim=(0, 1)), torch.ones(4), atol=1e-4, rtol=0)
