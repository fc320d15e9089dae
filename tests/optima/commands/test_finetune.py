"""A task teacher from imported weights: it learns the task, keeps what it had, and can teach."""

import json
from pathlib import Path

import pytest
import torch
from miniatures import make_snli_ve
from open_clip_oracle import CASES, weights

from optima.coca import CoCa
from optima.coca.checkpoint import load_coca, save_coca
from optima.coca.open_clip import to_open_clip
from optima.coca.open_clip_config import from_open_clip_config
from optima.commands.finetune import finetune, with_head
from optima.run import main
from optima.runs.config import FinetuneConfig
from optima.runs.words import read_words
from optima.tasks.pictograms import HEADS, PictogramTask
from optima_core import OptimaError, OptimiserConfig


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """An open_clip checkpoint of the pictograms' image and vocabulary sizes, imported by the command."""
    case = CASES["no_pooler"]
    shape = case | {
        "vision_cfg": case["vision_cfg"] | {"image_size": 64},
        "text_cfg": case["text_cfg"] | {"context_length": 14, "vocab_size": 144},
        "multimodal_cfg": case["multimodal_cfg"] | {"context_length": 14},
    }
    tensors = to_open_clip(CoCa(from_open_clip_config(shape)))
    torch.save(weights({name: list(tensor.shape) for name, tensor in tensors.items()}), tmp_path / "theirs.pt")
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    path = tmp_path / "imported.safetensors"
    arguments = ["--checkpoint", tmp_path / "theirs.pt", "--model_config", tmp_path / "shape.json", "--output", path]
    assert main(["import", *map(str, arguments)]) == 0
    return path


def config(run: Path, model: Path, **changes: object) -> FinetuneConfig:
    values: dict[str, object] = {
        "run": run, "model": model, "task": "vqa", "steps": 4, "batch_size": 4, "precision": "fp32", "threads": 1,
        "evaluate_every": 2, "evaluate_items": 4, "test_items": 6, "checkpoint_every": 1, "log_every": 1,
    }  # fmt: skip
    return FinetuneConfig(**(values | changes))  # type: ignore[arg-type]


def silent(_: str) -> None:
    pass


def test_activations_computed_again_change_no_weight(imported: Path, tmp_path: Path) -> None:
    kept, again = (
        load_coca(run / "model.safetensors").state_dict()
        for run in (tmp_path / "kept", tmp_path / "again")
        if finetune(config(run, imported, recompute=run.name == "again", evaluate_every=0), silent)
    )
    assert all(torch.equal(kept[name], tensor) for name, tensor in again.items())


def test_an_imported_model_becomes_a_task_teacher(imported: Path, brief: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    summary = finetune(config(tmp_path / "run", imported), said.append)
    assert summary["test_items"] == 6
    assert "accuracy" in summary["scores"]
    assert sum("validation accuracy" in line for line in said) == 2
    assert load_coca(tmp_path / "run" / "model.safetensors").head_specs == {"vqa": HEADS["vqa"]}
    assert read_words(tmp_path / "run").classes == PictogramTask("vqa").classes
    options = [*brief, "--teacher", str(tmp_path / "run" / "model.safetensors"), "--task", "vqa"]
    assert main([*options, "--run", str(tmp_path / "distilled")]) == 0


@pytest.mark.parametrize("task", ["captioning", "nlvr2", "snli_ve"])
def test_every_task_is_learnt(task: str, imported: Path, tmp_path: Path) -> None:
    said: list[str] = []
    optimiser = OptimiserConfig(learning_rate=1e-2, warmup=0.0)
    changes = {"task": task, "steps": 12, "batch_size": 8, "evaluate_every": 0, "test_items": 4, "optimiser": optimiser}
    finetune(config(tmp_path / "run", imported, **changes), said.append)
    losses = [float(line.split(f"{task} ")[1].split()[0]) for line in said]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_resumed_run_equals_an_uninterrupted_one(imported: Path, tmp_path: Path) -> None:
    finetune(config(tmp_path / "whole", imported), silent)

    class Killed(Exception):
        pass

    def killed_at_the_third(line: str) -> None:
        if line.startswith("step 3/"):
            raise Killed

    with pytest.raises(Killed):
        finetune(config(tmp_path / "killed", imported), killed_at_the_third)
    finetune(config(tmp_path / "killed", imported, resume=True), silent)
    whole, resumed = (tmp_path / run / "model.safetensors" for run in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_new_head_leaves_the_rest_alone_and_an_old_one_stays(make_coca) -> None:
    model, data = make_coca(heads=None), PictogramTask("snli_ve")
    grown = with_head(model, "it", data, 0)
    assert grown.head_specs == {"snli_ve": HEADS["snli_ve"]}
    assert all(torch.equal(grown.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert with_head(grown, "it", data, 1) is grown
    again = with_head(model, "it", data, 0)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in grown.state_dict().items())


def test_a_model_for_other_images_is_refused(tmp_path: Path, make_coca, capsys: pytest.CaptureFixture[str]) -> None:
    save_coca(make_coca(image_size=32), tmp_path / "m.safetensors")
    with pytest.raises(OptimaError, match="takes images of 32 pixels; those of pictograms have 64"):
        finetune(config(tmp_path / "run", tmp_path / "m.safetensors"), silent)
    assert not (tmp_path / "run").exists()
    options = ["--model", str(tmp_path / "m.safetensors"), "--run", str(tmp_path / "run")]
    assert main(["finetune", *options]) == 2
    assert "takes images of 32 pixels" in capsys.readouterr().err
    assert main(["finetune", *options, "--steps", "0"]) == 2
    assert "steps must be at least 1" in capsys.readouterr().err


def test_official_data_are_read_in_clips_tokens_by_a_model_that_has_them(
    tmp_path: Path, make_coca, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ftfy", reason="CLIP's tokenizer needs ftfy")
    (tmp_path / "snli_ve").mkdir()
    make_snli_ve(tmp_path / "snli_ve")
    save_coca(make_coca(heads=None, vocab_size=49408, image_size=32, context_length=20), tmp_path / "m.safetensors")
    options = {
        "model": tmp_path / "m.safetensors", "run": tmp_path / "run", "task": "snli_ve", "data.name": "snli_ve",
        "data.root": tmp_path / "snli_ve", "steps": 2, "batch_size": 2, "precision": "fp32", "threads": 1,
    }  # fmt: skip
    assert main(["finetune", *(f"--{name}={value}" for name, value in options.items())]) == 0
    assert "test accuracy/entailment" in capsys.readouterr().out
    words = read_words(tmp_path / "run")
    assert words.tokenizer.vocab_size == 49408
    assert words.classes == ("entailment", "neutral", "contradiction")
    assert load_coca(tmp_path / "run" / "model.safetensors").head_specs["snli_ve"].classes == 3
