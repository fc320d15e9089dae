"""Plans of models of transformers: what is counted of fake weights is what real ones take."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

hf = pytest.importorskip("transformers", reason="pip install 'optima-distill[hf]'")
pytest.importorskip("datasets", reason="pip install 'optima-distill[hf]'")

import tiny_transformers  # noqa: E402
from tiny_hf import question, write_llama, write_rows  # noqa: E402

from optima.commands.distill_hf.config import DistillHfConfig, PlanHfConfig  # noqa: E402
from optima.commands.plan.transformers import fill, measure_hf_needs, trace_models  # noqa: E402
from optima.run import main  # noqa: E402
from optima.runs.directory import RunDirectory  # noqa: E402
from optima_core import DistillerConfig, ObjectiveConfig  # noqa: E402


@pytest.mark.parametrize(
    "name",
    ["CLIP", "SigLIP 2", "BLIP-2", "Idefics 3", "Qwen2.5-VL", "Qwen3-VL", "PaliGemma", "LLaVA", "Whisper", "DINOv2",
     "BERT", "Gemma 3", "GPT-2"],
)  # fmt: skip
def test_fake_weights_take_what_real_ones_do(name: str, seed: int) -> None:
    case = tiny_transformers.CASES[name]
    batch = case.batch()
    if "input_ids" in batch and "language" in case.modules:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    engine = DistillerConfig(teacher_ahead=False)
    real = [tiny_transformers.make(name, layers) for layers in (3, 2)]
    expected = trace_models(*real, batch, batch, engine, "cpu", contextlib.nullcontext())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        empty = [case.make(layers) for layers in (3, 2)]
    fill(empty, fake)
    found = trace_models(*empty, batch, batch, engine, "cpu", fake)
    teacher, student = (sum(p.numel() for p in model.parameters()) for model in real)
    assert (found.teacher_parameters, found.student_parameters) == (teacher, student)
    trained = sum(p.numel() for p in real[1].parameters() if p.requires_grad)
    assert found.gradients == expected.gradients == 4 * (trained + found.projection_parameters)
    assert found.operations == expected.operations
    for part in ("weights", "optimiser", "probe", "activations", "probe_peak", "step_peak"):
        assert getattr(found, part) == pytest.approx(getattr(expected, part), rel=0.02), part


@pytest.fixture
def planned(tmp_path: Path) -> dict[str, Any]:
    data = write_rows(tmp_path / "rows.jsonl", question)
    models = {
        name: write_llama(tmp_path / name, layers, weights=False) for name, layers in (("teacher", 3), ("student", 2))
    }
    return {"data": data, "batch_size": 4, "probe_size": 3, **models}


def test_the_command_counts_models_of_which_there_is_no_weight(
    planned: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = measure_hf_needs(PlanHfConfig(**planned))
    weights = needs.teacher_parameters + needs.student_parameters + needs.projection_parameters
    assert needs.weights == pytest.approx(4 * weights, rel=0.01)
    # 12 words, and 4 rows; a multiplication and an addition for every weight of a matrix.
    assert needs.teacher_operations == pytest.approx(2 * 4 * 12 * needs.teacher_parameters, rel=0.5)
    directory = RunDirectory(tmp_path / "run", resume=False, keep=1)
    directory.write_config(DistillHfConfig(**planned))
    words = ["plan_hf", "--config", str(directory.path / "config.yaml")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["needs"]["weights"] == needs.weights
    assert found["fits"]
    assert main([*words, "--memory", str(needs.peak / 1e9)]) == 0
    said = capsys.readouterr().out
    assert "Does not fit" in said
    assert "--recompute" in said or "--batch_size 2" in said


def test_adapters_and_recomputed_layers_take_less(planned: dict[str, Any]) -> None:
    pytest.importorskip("peft", reason="pip install peft")
    engine = DistillerConfig(objective=ObjectiveConfig(attention=0), balance="none", teacher_ahead=False)
    whole = measure_hf_needs(PlanHfConfig(**planned, engine=engine))
    again = measure_hf_needs(PlanHfConfig(**planned, engine=engine, recompute=True))
    assert again.operations > whole.operations
    assert again.activations < whole.activations
    adapted = measure_hf_needs(PlanHfConfig(**planned, engine=engine, lora=2))
    trained = adapted.gradients / 4 - adapted.projection_parameters
    assert 0 < trained < 0.5 * whole.student_parameters
    assert adapted.student_parameters > whole.student_parameters


def test_what_is_not_there_is_told_in_a_line(planned: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--{name}={value}" for name, value in (planned | {"teacher": "nowhere"}).items()]
    assert main(["plan_hf", *words]) == 2
    said = capsys.readouterr().err
    assert "teacher nowhere cannot be loaded" in said
    assert said.count("\n") == 1
