"""Plans beside real peaks on a CPU, arithmetic by hand, and what the command says."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optima.coca import CoCa, CoCaConfig, HeadSpec, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.checkpoint import config_from_dict
from optima.plan import GPUS, Needs, PlanConfig, largest_batch, measure_needs, predicted_seconds
from optima.run import main
from optima_core import DistillerConfig, ObjectiveConfig

MIB = 2**20


def sizes(width: int, layers: int, heads: int, image_size: int = 64, vocab: int = 500, length: int = 24) -> CoCaConfig:
    return CoCaConfig(
        width,
        ImageEncoderConfig(image_size, 8, width, layers, heads),
        TextDecoderConfig(vocab, length, width, layers, heads),
        MultimodalDecoderConfig(width, layers, heads),
    )


def settings(**changes: Any) -> dict[str, Any]:
    """Arguments of `measure_needs`, but for the engine's."""
    return {
        "task": "vqa",
        "batch_size": 96,
        "probe_size": 8,
        "text_length": 24,
        "classes": 50,
        "precision": "fp32",
        "accumulate": 1,
        "teacher": dataclasses.asdict(sizes(192, 3, 6)),
        "student": dataclasses.asdict(sizes(128, 2, 4)),
        **changes,
    }


def planned(chosen: dict[str, Any], **others: Any) -> Needs:
    chosen = dict(chosen)
    engine = DistillerConfig(
        precision=chosen.pop("precision"),
        accumulate=chosen.pop("accumulate"),
        objective=ObjectiveConfig(attention_heads="mean"),
    )
    models = [config_from_dict(chosen.pop(name)) for name in ("teacher", "student")]
    return measure_needs(*models, chosen.pop("task"), engine=engine, **chosen, **others)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task": "captioning", "classes": 0, "accumulate": 2, "precision": "bf16"},
    ],
    ids=["vqa, fp32", "captioning in two parts, bf16"],
)
def test_the_planned_peak_is_the_real_one_within_a_fifth(changes: dict[str, Any]) -> None:
    chosen = settings(**changes)
    small = {"batch_size": 2, "probe_size": 2} | {
        name: dataclasses.asdict(sizes(16, 1, 2)) for name in ("teacher", "student")
    }
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("plan_in_process.py")
    words = [sys.executable, str(script), json.dumps(chosen), json.dumps(chosen | small)]
    real = int(subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout)
    plan = planned(chosen, device="cpu").peak
    print(f"planned {plan / MIB:.1f} MiB, real {real / MIB:.1f} MiB")
    assert plan == pytest.approx(real, rel=0.2)


def test_parts_of_a_plan_by_hand() -> None:
    chosen = settings(batch_size=3, probe_size=2)
    needs = planned(chosen)
    heads = {"vqa": HeadSpec(50)}
    counts = [
        sum(p.numel() for p in CoCa(config_from_dict(chosen[name]), heads).parameters())
        for name in ("teacher", "student")
    ]
    assert [needs.teacher_parameters, needs.student_parameters] == counts
    layers, ours, theirs = 3 * 2, 128, 192
    assert needs.projection_parameters == layers * (ours * theirs + theirs)
    trained = needs.student_parameters + needs.projection_parameters
    assert needs.gradients == 4 * trained
    assert needs.optimiser == pytest.approx(8 * trained, rel=1e-3)
    assert needs.weights == pytest.approx(4 * (needs.teacher_parameters + trained), rel=1e-3)
    assert needs.peak >= needs.resident + needs.activations
    # A multiplication and an addition for every weight of a matrix and token; attention, of few tokens, comes on top.
    blocks = 3 * 12 * 192**2 * (65 + 24) + 3 * (12 * 192**2 + 8 * 192**2 + 2 * 192**2) * 24 + 3 * 2 * 192**2 * 64
    assert 2 * 3 * blocks < needs.teacher_operations < 1.25 * 2 * 3 * blocks
    assert needs.backward_operations == pytest.approx(2 * needs.student_operations, rel=0.05)


def test_activations_and_operations_grow_with_the_batch_and_parts_bound_the_former() -> None:
    one, two = (planned(settings(batch_size=size)) for size in (8, 16))
    parts = planned(settings(batch_size=8, accumulate=2))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    assert two.operations == pytest.approx(2 * one.operations, rel=0.01)
    assert parts.operations == pytest.approx(two.operations, rel=0.01)
    assert one.peak < parts.peak < two.peak


def test_a_prediction_is_operations_over_the_assumed_rate_and_the_optimisers_traffic() -> None:
    needs = Needs(0, 10**9, 0, 0, 0, 0, 0, 0, 0, 0, 1e15, 1e15, 1e15, 1e15)
    a100 = GPUS[0]
    seconds = predicted_seconds(needs, a100, PlanConfig(utilisation=0.5))
    assert seconds == pytest.approx(4e15 / (312e12 * 0.5) + 28e9 / (0.8 * 2.04e12))
    fp32 = predicted_seconds(needs, a100, PlanConfig(utilisation=0.5, engine=DistillerConfig()))
    assert fp32 == pytest.approx(4e15 / (19.5e12 * 0.5) + 28e9 / (0.8 * 2.04e12))
    some = dataclasses.replace(needs, weights=10**9, gradients=10**9, peak=5 * 10**9)
    assert largest_batch(some, 10, 11.0) == 20


SMALL = ["plan", "--teacher", "tiny12-32", "--student", "tiny6-32", "--batch_size", "16", "--probe_size", "32"]


def test_the_command_prints_figures_and_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["advice"] == []
    assert set(found["predicted"]) == {gpu.name for gpu in GPUS}
    assert main([*SMALL, "--memory", str(found["needs"]["peak"] / 1e9)]) == 0
    said = capsys.readouterr().out
    assert "Predictions, not measurements" in said
    assert "Does not fit" in said
    assert "--probe_size 16:" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--teacher", "coca_ViT-L-15"], "unknown preset coca_ViT-L-15; did you mean coca_ViT-L-14"),
        (["--utilisation", "1.5"], "utilisation must be in (0, 1], got 1.5"),
        (["--text_length", "100"], "text_length must be at most 76"),
        (["--student", "tiny12-32"], "both must be equal"),
    ],
)
def test_mistakes_end_in_a_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert complaint in capsys.readouterr().err
