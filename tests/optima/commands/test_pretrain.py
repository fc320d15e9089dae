"""Training from scratch: both phases run, the losses fall, a resumed run equals an uninterrupted one."""

from pathlib import Path

import pytest
import torch
import yaml

from optima.coca import CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.checkpoint import load_coca
from optima.commands.pretrain import caption_losses, pretrain, task_losses
from optima.data.pictograms.stream import Pictograms
from optima.data.tokenizer import word_tokenizer
from optima.run import main
from optima.runs.config import PretrainConfig
from optima.task import TASKS
from optima.tasks.forward import TaskForward
from optima.tasks.pictograms import HEADS, PictogramTask
from optima_core import CheckpointStore, OptimaError, OptimiserConfig

MODEL = CoCaConfig(
    8,
    ImageEncoderConfig(64, 16, 16, 1, 2, 2.0),
    TextDecoderConfig(144, 14, 16, 1, 2, 2.0),
    MultimodalDecoderConfig(16, 1, 2, 2.0),
)


def config(run: Path, **changes: object) -> PretrainConfig:
    values: dict[str, object] = {
        "run": run, "model": MODEL, "caption_steps": 2, "task_steps": 2, "images": 4, "precision": "fp32",
        "stored": "fp32", "checkpoint_every": 1, "log_every": 1, "threads": 1,
    }  # fmt: skip
    return PretrainConfig(**(values | changes))  # type: ignore[arg-type]


def silent(_: str) -> None:
    pass


def test_both_phases_run_and_the_model_has_all_heads(tmp_path: Path) -> None:
    said: list[str] = []
    path = pretrain(config(tmp_path / "run"), said.append)
    assert path == tmp_path / "run" / "model.safetensors"
    model = load_coca(path)
    assert model.head_specs == HEADS
    assert [line.split()[1] for line in said] == ["1/4", "2/4", "3/4", "4/4"]
    assert "contrastive" in said[0]
    assert all(task in said[-1] for task in TASKS)


def test_a_student_start_that_saw_no_task_has_no_heads(tmp_path: Path) -> None:
    assert load_coca(pretrain(config(tmp_path / "run", task_steps=0), silent)).head_specs == {}


def test_the_losses_fall(tmp_path: Path) -> None:
    said: list[str] = []
    optimiser = OptimiserConfig(learning_rate=1e-2, warmup=0.0)
    pretrain(config(tmp_path / "run", caption_steps=25, task_steps=0, images=8, optimiser=optimiser), said.append)
    losses = [float(line.split("caption ")[1].split()[0]) for line in said]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(config(tmp_path / "whole", precision=precision), silent)

    class Killed(Exception):
        pass

    def killed_at_the_third(line: str) -> None:
        if line.startswith("step 3/"):
            raise Killed

    with pytest.raises(Killed):
        pretrain(config(tmp_path / "killed", precision=precision), killed_at_the_third)
    state = CheckpointStore(tmp_path / "killed" / "checkpoints").load()
    assert state is not None
    assert state["step"] == 2
    resumed = pretrain(config(tmp_path / "killed", precision=precision, resume=True), silent)
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_run_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    pretrain(config(tmp_path / "run"), silent)
    with pytest.raises(OptimaError, match="images was 4 there and is 6 now"):
        pretrain(config(tmp_path / "run", images=6, resume=True), silent)
    with pytest.raises(OptimaError, match="is not empty"):
        pretrain(config(tmp_path / "run"), silent)


def test_a_loss_that_explodes_is_named(tmp_path: Path) -> None:
    optimiser = OptimiserConfig(learning_rate=1e30, warmup=0.0)
    with pytest.raises(OptimaError, match=r"loss caption.* is not finite at step 1"):
        pretrain(config(tmp_path / "run", optimiser=optimiser), silent)
    assert CheckpointStore(tmp_path / "run" / "checkpoints").load() is not None


def test_the_joint_task_losses_are_those_of_the_tasks_alone(make_coca, seed: int) -> None:
    model, tokenizer = make_coca(16, 1), word_tokenizer()
    batch = Pictograms("train", 3).training_batch(0, 4, 2, 3, 2)
    losses = task_losses(model, batch, tokenizer)
    images = batch.images.float() / 127.5 - 1
    cross_entropy = torch.nn.functional.cross_entropy

    def encode(texts: list[str]) -> torch.Tensor:
        return tokenizer.encode(texts, 14)

    for task, texts, targets, each in (
        ("vqa", batch.questions, batch.answers, 2),
        ("snli_ve", batch.hypotheses, batch.labels, 3),
    ):
        output = model(images.repeat_interleave(each, 0)[:, None], encode(texts))
        torch.testing.assert_close(losses[task], cross_entropy(model.class_logits(task, output), targets))
    output = model(images.view(2, 2, 3, 64, 64).repeat_interleave(2, 0), encode(batch.statements))
    torch.testing.assert_close(losses["nlvr2"], cross_entropy(model.class_logits("nlvr2", output), batch.truths))
    batch_alone = PictogramTask("captioning", 3).training_batch(0, 4)
    batch_alone = batch_alone._replace(images=images[:, None], tokens=encode(batch.captions))
    torch.testing.assert_close(losses["captioning"], TaskForward(model, "captioning")(batch_alone, {}).task_loss)
    first_phase = caption_losses(model, batch, tokenizer, 0.0)
    torch.testing.assert_close(first_phase["caption"], losses["captioning"])
    assert first_phase["contrastive"] == 0


def test_the_command_trains_and_its_model_can_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    towers = {name: {"width": 16, "layers": 1} for name in ("text_decoder", "multimodal_decoder")}
    model = {"image_encoder": {"width": 16, "layers": 1, "patch_size": 16}, **towers}
    values = {"model": model, "caption_steps": 1, "task_steps": 1, "images": 4, "threads": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    assert main(["pretrain", "--run", run, "--config", str(tmp_path / "tiny.yaml")]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert main(["evaluate", "--model", f"{run}/model.safetensors", "--tasks", "[vqa,nlvr2]", "--items", "10"]) == 0
    text = capsys.readouterr().out
    assert "vqa" in text
    assert "nlvr2" in text
