"""Trains a CoCa from scratch on pictograms: contrastive and captioning first, then the four tasks jointly.

With this the shipped teacher and the shipped student start were made; their model cards give the commands. A step
encodes each picture once and decodes several texts about it, since on a CPU the picture is the dearest part.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from optima.coca import CoCa, CoCaConfig, captioning_loss, contrastive_loss
from optima.coca.checkpoint import save_coca
from optima.data.normalise import normalise
from optima.data.pictograms.stream import Pictograms, TrainingBatch
from optima.data.tokenizer import Tokenizer, word_tokenizer
from optima.run_directory import RunDirectory
from optima.task import TASKS, Task
from optima.tasks.fit import refuse_misfit
from optima.tasks.pictograms import HEADS, TEXT_LENGTH, PictogramTask
from optima.training import train
from optima_core.config import OptimiserConfig, Precision


@dataclass(frozen=True)
class PretrainConfig:
    """How a CoCa is trained from scratch.

    Attributes:
        run: Run directory, new or empty; see also resume. At the end it holds model.safetensors.
        model: Sizes of the model.
        caption_steps: Optimiser steps on contrastive and captioning losses.
        task_steps: Optimiser steps on captioning, VQA, NLVR2 and SNLI-VE jointly, after the caption steps.
        pictures: Pictures a step, an even number.
        questions: VQA items a picture in the task steps.
        hypotheses: SNLI-VE items a picture in the task steps.
        statements: NLVR2 items a pair of pictures in the task steps.
        contrastive: Weight of the contrastive loss beside a captioning loss of weight 1.
        optimiser: AdamW and its schedule over all steps.
        precision: Arithmetic of the forward pass; weights and optimiser stay fp32.
        compile: Compile the three modules with torch.compile: a minute's wait, then 1.3 times the steps a second
            (measured on one core of an AMD EPYC with AVX-512 bf16); needs a C++ compiler on a CPU.
        stored: Floating-point type of the weights in model.safetensors.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between progress lines.
        seed: Seed of the initialisation and of the data stream.
        threads: CPU threads; 0 takes what torch chooses.
        resume: Continue from the newest checkpoint of the run directory.
    """

    run: Path = Path("runs/pretrain")
    model: CoCaConfig = field(default_factory=CoCaConfig)
    caption_steps: int = 2000
    task_steps: int = 6000
    pictures: int = 64
    questions: int = 2
    hypotheses: int = 1
    statements: int = 1
    contrastive: float = 0.2
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    precision: Precision = "bf16"
    compile: bool = False
    stored: Literal["fp32", "fp16"] = "fp16"
    checkpoint_every: int = 200
    log_every: int = 50
    seed: int = 0
    threads: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("pictures", 2),
            ("checkpoint_every", 1),
            ("log_every", 1),
            ("caption_steps", 0),
            ("task_steps", 0),
            ("questions", 1),
            ("hypotheses", 1),
            ("statements", 1),
            ("seed", 0),
            ("threads", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.pictures % 2:
            raise ValueError(f"pictures must be an even number, got {self.pictures}")
        if not self.caption_steps + self.task_steps:
            raise ValueError("caption_steps and task_steps are both 0; give at least one step")


def pretrain(config: PretrainConfig, say: Callable[[str], None] = print) -> Path:
    """Trains the model and returns the path of its safetensors file."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    tokenizer = word_tokenizer()
    model = CoCa(config.model, HEADS if config.task_steps else None)
    for task in TASKS:
        refuse_misfit(model, "the model", PictogramTask(task))
    data = Pictograms("train", config.seed)

    def losses(step: int) -> dict[str, Tensor]:
        batch = data.training_batch(
            step * config.pictures, config.pictures, config.questions, config.hypotheses, config.statements
        )
        if step < config.caption_steps:
            return caption_losses(model, batch, tokenizer, config.contrastive)
        return task_losses(model, batch, tokenizer)

    directory = RunDirectory(config.run, resume=config.resume, keep=2)
    train(model, config.caption_steps + config.task_steps, losses, config, directory, say)
    path = config.run / "model.safetensors"
    save_coca(model, path, torch.float16 if config.stored == "fp16" else torch.float32)
    return path


def caption_losses(model: CoCa, batch: TrainingBatch, tokenizer: Tokenizer, contrastive: float) -> dict[str, Tensor]:
    """The pre-training losses: every picture with its caption."""
    tokens = tokenizer.encode(batch.captions, TEXT_LENGTH)
    output = model(normalise(batch.images)[:, None], tokens, with_class=True)
    caption = captioning_loss(model.caption_logits(output.states), tokens, tokenizer.pad_id)
    return {
        "caption": caption,
        "contrastive": contrastive * contrastive_loss(output.image_feature, output.text_feature, model.logit_scale),
    }


def task_losses(model: CoCa, batch: TrainingBatch, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The four tasks' losses of one batch; all texts of a picture go through the decoders together."""
    pictures = len(batch.images)
    feature, image_tokens, _ = model.image_encoder(normalise(batch.images))
    tokens = tokenizer.encode([*batch.captions, *batch.questions, *batch.hypotheses, *batch.statements], TEXT_LENGTH)
    captions, questions, hypotheses, statements = torch.split(
        tokens, [len(batch.captions), len(batch.questions), len(batch.hypotheses), len(batch.statements)]
    )
    # A statement is about two pictures, so its text is decoded over each of them.
    over_each = statements.view(pictures // 2, 1, -1, TEXT_LENGTH).expand(-1, 2, -1, -1)
    about: dict[Task, Tensor] = {
        "captioning": captions.view(pictures, 1, TEXT_LENGTH),
        "vqa": questions.view(pictures, -1, TEXT_LENGTH),
        "snli_ve": hypotheses.view(pictures, -1, TEXT_LENGTH),
        "nlvr2": over_each.reshape(pictures, -1, TEXT_LENGTH),
    }
    output = model.decode(feature, image_tokens, torch.cat(list(about.values()), dim=1).flatten(0, 1))
    texts = [found.shape[1] for found in about.values()]
    by_picture = zip(
        about,
        torch.split(output.states.view(pictures, -1, *output.states.shape[1:]), texts, dim=1),
        torch.split(output.valid.view(pictures, -1, *output.valid.shape[1:]), texts, dim=1),
        strict=True,
    )
    losses: dict[str, Tensor] = {}
    targets = {"vqa": batch.answers, "snli_ve": batch.labels, "nlvr2": batch.truths}
    for task, states, valid in by_picture:
        if task == "captioning":
            losses[task] = captioning_loss(model.caption_logits(states[:, 0]), captions, tokenizer.pad_id)
            continue
        images = TASKS[task].images
        if images > 1:  # the head takes the pictures of a text one after the other
            states, valid = (x.reshape(-1, images, *x.shape[1:]).transpose(1, 2).flatten(0, 1) for x in (states, valid))
        logits = model.heads[task](states.flatten(0, 1), valid.flatten(0, 1))
        losses[task] = F.cross_entropy(logits.float(), targets[task])
    return losses
