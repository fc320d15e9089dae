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
from optima.coca.presets import preset
from optima.commands.options import PlanConfig
from optima.commands.plan.needs import Needs, measure_needs
from optima.commands.plan.predict import GPUS, largest_batch, predicted_hours, predicted_seconds, rates_of
from optima.commands.plan.training import measure_training
from optima.run import main
from optima.runs.config import DistillConfig
from optima.runs.directory import RunDirectory
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
        "recompute": False,
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
        read_arm=chosen.pop("read_arm", True),
        ema=chosen.pop("ema", 0.0),
        balance=chosen.pop("balance", "gradient"),
        cuda_graphs=chosen.pop("cuda_graphs", False),
        teacher_ahead=chosen.pop("teacher_ahead", False),  # the processes measured here have one thread
    )
    models = [config_from_dict(chosen.pop(name)) for name in ("teacher", "student")]
    return measure_needs(*models, chosen.pop("task"), engine=engine, **chosen, **others)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task": "captioning", "classes": 0, "accumulate": 2, "precision": "bf16"},
        {"recompute": True, "batch_size": 128},
    ],
    ids=["vqa, fp32", "captioning in two parts, bf16", "vqa, activations recomputed"],
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


def test_a_teacher_that_runs_ahead_on_a_cpu_takes_a_batch_and_a_forward_pass_more() -> None:
    ahead, after = (planned(settings(teacher_ahead=ahead), device="cpu") for ahead in (True, False))
    assert after.ahead == 0
    assert ahead.step_peak == after.step_peak + ahead.ahead
    pictures, taps = 96 * 3 * 64**2, 96 * (65 + 24 + 24) * 3 * 3 * 192  # of each layer state, q and k
    assert 4 * (pictures + taps) < ahead.ahead < 2 * 4 * (pictures + taps)
    assert planned(settings(teacher_ahead=True), device="gpu").ahead == 0


def test_activations_and_operations_grow_with_the_batch_and_parts_bound_the_former() -> None:
    one, two = (planned(settings(batch_size=size, balance="none")) for size in (8, 16))
    parts = planned(settings(batch_size=8, accumulate=2, balance="none"))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    assert two.operations == pytest.approx(2 * one.operations, rel=0.01)
    assert parts.operations == pytest.approx(two.operations, rel=0.01)
    assert one.peak < parts.peak < two.peak


def test_looking_at_the_gradients_of_each_part_takes_their_memory() -> None:
    """Beside the graph, which a look keeps: those of the predictions, of the total, and of the part."""
    looks, steps = (planned(settings(batch_size=2, balance=balance)) for balance in ("gradient", "none"))
    assert looks.operations == steps.operations
    assert steps.gradients < looks.step_peak - steps.step_peak < 3 * steps.gradients + steps.activations


def test_recomputed_layers_keep_less_and_run_again_in_the_backward_pass() -> None:
    kept, again = (planned(settings(student=DEEP, recompute=recompute)) for recompute in (False, True))
    assert again.weights == kept.weights
    assert again.activations < 0.7 * kept.activations
    assert again.step_peak < kept.step_peak
    assert again.teacher_operations == kept.teacher_operations
    assert again.student_operations == kept.student_operations
    repeated = again.backward_operations - kept.backward_operations
    assert 0.6 * kept.student_operations < repeated < kept.student_operations  # all but embeddings, poolers, head


def test_what_the_probe_takes_bounds_the_batch_too() -> None:
    few, many = (planned(settings(batch_size=8, probe_size=size, balance="none")) for size in (8, 64))
    assert many.step_peak - few.step_peak == many.probe - few.probe
    assert many.probe_peak - few.probe_peak > many.probe - few.probe
    assert many.peak == many.probe_peak > many.step_peak
    assert largest_batch(many, 8, 1.05 * many.probe_peak / 1e9) == 0
    assert largest_batch(many, 8, 1.2 * many.probe_peak / 1e9) > 8


def test_an_update_behind_gates_keeps_copies_of_projections_and_moments() -> None:
    """Where nothing else of a step is alive: few items, so that the update is where the most is."""
    wide = dataclasses.asdict(sizes(256, 2, 4, vocab=50))
    chosen = settings(batch_size=1, probe_size=1, student=wide, classes=2, balance="none")
    known, gated = planned(chosen), planned(chosen | {"read_arm": False})
    projections = 2 * 3 * (256 * 192 + 192)
    assert known.projection_parameters == projections
    copies = 4 * projections * 3
    assert 0.9 * copies < gated.step_peak - known.step_peak < 1.1 * copies


def test_a_recorded_step_keeps_its_memory() -> None:
    launched, recorded = (planned(settings(batch_size=8, cuda_graphs=graphs)) for graphs in (False, True))
    assert recorded.step_peak == launched.step_peak
    assert recorded.peak == launched.peak + launched.step_peak - launched.resident
    memory = 2 * recorded.peak / 1e9
    assert 0.4 < largest_batch(recorded, 8, memory) / largest_batch(launched, 8, memory) < 0.6


def test_the_running_average_is_as_large_as_the_student_and_fp16_is_planned_too() -> None:
    chosen = settings(batch_size=2, probe_size=2)
    half = planned(chosen | {"precision": "fp16", "ema": 0.9})
    assert half.average == pytest.approx(4 * half.student_parameters, rel=1e-3)
    assert half.weights == pytest.approx(planned(chosen).weights, rel=1e-3)


def test_a_prediction_is_operations_over_the_assumed_rate_and_the_optimisers_traffic() -> None:
    needs = Needs(0, 10**9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1e15, 1e15, 1e15, 1e15)
    a100, half = GPUS["A100"], DistillerConfig(precision="bf16")
    seconds = predicted_seconds(needs, rates_of(PlanConfig(utilisation=0.5, engine=half), a100))
    assert seconds == pytest.approx(4e15 / (312e12 * 0.5) + 28e9 / (0.8 * 2.04e12))
    fp32 = predicted_seconds(needs, rates_of(PlanConfig(utilisation=0.5), a100))
    assert fp32 == pytest.approx(4e15 / (19.5e12 * 0.5) + 28e9 / (0.8 * 2.04e12))
    own = predicted_seconds(needs, rates_of(PlanConfig(chip="cpu", peak=0.1, utilisation=0.5)))
    assert own == pytest.approx(4e15 / (0.1e12 * 0.5))
    assert predicted_seconds(needs, rates_of(PlanConfig(chip="cpu", peak=0.1, bandwidth=0.01))) == pytest.approx(
        4e15 / (0.1e12 * 0.4) + 28e9 / (0.8 * 0.01e12)
    )
    assert rates_of(PlanConfig(chip="cpu")) is None
    some = dataclasses.replace(needs, weights=10**9, gradients=10**9, step_peak=5 * 10**9)
    assert largest_batch(some, 10, 11.0) == 20


def test_hours_are_of_all_steps_and_probes() -> None:
    needs = Needs(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1e12, 2e12, 3e12, 4e12)
    config = PlanConfig(
        batch_size=8, probe_size=40, engine=DistillerConfig(rounds=30, steps_per_round=20, accumulate=2)
    )
    assert predicted_hours(needs, config, 6.0, 16) == pytest.approx(30 * (20 * 6 + 6 * 0.2 * 40 / 16) / 3600)


@pytest.mark.parametrize("recompute", [False, True])
def test_finetuning_is_planned_by_hand(recompute: bool) -> None:
    shape = sizes(128, 3, 4)
    one, two = (
        measure_training(
            shape,
            "vqa",
            batch_size=size,
            text_length=24,
            classes=50,
            precision="fp32",
            recompute=recompute,
            device="cpu",
        )
        for size in (8, 16)
    )
    assert one.parameters == sum(p.numel() for p in CoCa(shape, {"vqa": HeadSpec(50)}).parameters())
    assert one.gradients == 4 * one.parameters
    assert one.optimiser == pytest.approx(8 * one.parameters, rel=1e-3)
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    assert two.operations == pytest.approx(2 * one.operations, rel=0.01)
    assert two.peak > two.weights + two.optimiser + two.activations
    kept = measure_training(shape, "vqa", batch_size=16, text_length=24, classes=50, precision="fp32", device="cpu")
    assert (two.activations < 0.7 * kept.activations) is recompute
    assert (two.operations > 1.2 * kept.operations) is recompute


DEEP = dataclasses.asdict(sizes(128, 3, 4))

LARGE = ["plan", "--config", "coca_large_to_tiny6_vqa"]
SMALL = ["plan", "--batch_size", "16", "--probe_size", "32", "--engine.precision", "bf16"]


def test_the_command_prints_figures_and_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["teacher"], found["student"]) == ("the shipped teacher", "the shipped student")
    assert found["fits"]
    assert found["advice"] == []
    assert set(found["predicted"]) == {gpu.name for gpu in GPUS.values()}
    assert found["seconds"] == found["predicted"][GPUS["H100"].name]["seconds"]
    assert found["hours"] > 60 * 25 * found["seconds"] / 3600
    assert main([*SMALL, "--memory", str(found["needs"]["peak"] / 1e9)]) == 0
    said = capsys.readouterr().out
    assert "Predictions, not measurements" in said
    assert "Does not fit" in said
    options = ["--probe_size 16: peak", "--batch_size 8 --engine.accumulate 2: the step in parts", "--recompute: peak"]
    places = [said.index(option) for option in options]
    assert places == sorted(places)


def test_a_shipped_recipe_is_planned_before_its_teacher_and_data_are_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def needs(*models: CoCaConfig | str, **settings: Any) -> Needs:
        asked.update(settings, models=models)
        return Needs(*[1] * 15)

    monkeypatch.setattr("optima.commands.plan.job.measure_needs", needs)
    assert main([*LARGE, "--recompute", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    teacher = preset("coca_ViT-L-14")
    assert found["teacher"] == "coca_ViT-L-14 (to become runs/coca_large_vqa/model.safetensors)"
    assert asked["models"] == (teacher, preset("tiny6", teacher), "vqa")
    assert (asked["batch_size"], asked["probe_size"], asked["text_length"], asked["classes"]) == (64, 128, 24, 3129)
    assert asked["engine"].objective.attention_heads == "relation"
    assert asked["recompute"]


def test_the_resolved_configuration_of_a_run_is_planned_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(tmp_path / "run", resume=False, keep=1)
    directory.write_config(DistillConfig(task="nlvr2", batch_size=4, probe_size=4))
    assert main(["plan", "--config", str(directory.path / "config.yaml")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the shipped teacher -> the shipped student, nlvr2, batch 4, fp32" in said


def test_the_command_plans_the_teachers_finetuning(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--stage", "finetune", "--batch_size", "8", "--chip", "cpu"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["needs"]["peak"] > found["needs"]["weights"] + found["needs"]["optimiser"]
    assert found["seconds"] is None
    assert main([*words, "--peak", "0.1", "--memory", str(found["needs"]["peak"] / 1e9)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "finetuning the shipped teacher, captioning, batch 8, fp32" in said
    assert "s on cpu, estimated" in said
    assert "Does not fit" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--teacher", "coca_ViT-L-15"], "unknown preset coca_ViT-L-15; did you mean coca_ViT-L-14"),
        (["--teacher", "mine.safetensors"], "teacher mine.safetensors is not there yet; say whose sizes it will have"),
        (["--student", "mine.safetensors"], "student mine.safetensors is not there yet"),
        (["--utilisation", "1.5"], "utilisation must be in (0, 1], got 1.5"),
        (["--data.text_length", "100"], "text_length must be at most 76"),
        (["--student", "tiny12-32"], "both must be equal"),
        (["--task", "nlvr2"], "data vqav2 serves task vqa, not nlvr2"),
        (["--data.name", "pictograms", "--data.root", "null"], "coca_ViT-L-14 (to become runs/coca_large_vqa"),
    ],
)
def test_mistakes_end_in_a_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LARGE, *words]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
