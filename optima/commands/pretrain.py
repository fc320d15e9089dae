"""Trains a CoCa from scratch on pictograms: contrastive and captioning first, then the four tasks jointly.

With this the shipped teacher and the shipped student start were made; their model cards give the commands. A step
encodes each image once and decodes several texts about it, since on a CPU the image is the dearest part.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from optima.coca import CoCa, captioning_loss, contrastive_loss
from optima.coca.checkpoint import save_coca
from optima.data.normalise import normalise
from optima.data.pictograms.stream import Pictograms, TrainingBatch
from optima.data.tokenizer import Tokenizer, word_tokenizer
from optima.runs.config import PretrainConfig
from optima.runs.directory import RunDirectory
from optima.runs.training import train
from optima.task import TASKS, Task
from optima.tasks.fit import refuse_misfit
from optima.tasks.pictograms import HEADS, TEXT_LENGTH, PictogramTask


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
            step * config.images, config.images, config.questions, config.hypotheses, config.statements
        )
        if step < config.caption_steps:
            return caption_losses(model, batch, tokenizer, config.contrastive)
        return task_losses(model, batch, tokenizer)

    with RunDirectory(config.run, resume=config.resume, keep=2) as directory:
        train(model, config.caption_steps + config.task_steps, losses, config, directory, say)
        path = config.run / "model.safetensors"
        save_coca(model, path, torch.float16 if config.stored == "fp16" else torch.float32)
    return path


def caption_losses(model: CoCa, batch: TrainingBatch, tokenizer: Tokenizer, contrastive: float) -> dict[str, Tensor]:
    """The pre-training losses: every image with its caption."""
    tokens = tokenizer.encode(batch.captions, TEXT_LENGTH)
    output = model(normalise(batch.images)[:, None], tokens, with_class=True)
    caption = captioning_loss(model.caption_logits(output.states), tokens, tokenizer.pad_id)
    return {
        "caption": caption,
        "contrastive": contrastive * contrastive_loss(output.image_feature, output.text_feature, model.logit_scale),
    }


def task_losses(model: CoCa, batch: TrainingBatch, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The four tasks' losses of one batch; all texts of an image go through the decoders together."""
    image_count = len(batch.images)
    feature, image_tokens, _ = model.image_encoder(normalise(batch.images))
    tokens = tokenizer.encode([*batch.captions, *batch.questions, *batch.hypotheses, *batch.statements], TEXT_LENGTH)
    captions, questions, hypotheses, statements = torch.split(
        tokens, [len(batch.captions), len(batch.questions), len(batch.hypotheses), len(batch.statements)]
    )
    # A statement is about two images, so its text is decoded over each of them.
    over_each = statements.view(image_count // 2, 1, -1, TEXT_LENGTH).expand(-1, 2, -1, -1)
    about: dict[Task, Tensor] = {
        "captioning": captions.view(image_count, 1, TEXT_LENGTH),
        "vqa": questions.view(image_count, -1, TEXT_LENGTH),
        "snli_ve": hypotheses.view(image_count, -1, TEXT_LENGTH),
        "nlvr2": over_each.reshape(image_count, -1, TEXT_LENGTH),
    }
    output = model.decode(feature, image_tokens, torch.cat(list(about.values()), dim=1).flatten(0, 1))
    texts = [found.shape[1] for found in about.values()]
    by_image = zip(
        about,
        torch.split(output.states.view(image_count, -1, *output.states.shape[1:]), texts, dim=1),
        torch.split(output.valid.view(image_count, -1, *output.valid.shape[1:]), texts, dim=1),
        strict=True,
    )
    losses: dict[str, Tensor] = {}
    targets = {"vqa": batch.answers, "snli_ve": batch.labels, "nlvr2": batch.truths}
    for task, states, valid in by_image:
        if task == "captioning":
            losses[task] = captioning_loss(model.caption_logits(states[:, 0]), captions, tokenizer.pad_id)
            continue
        each = TASKS[task].images
        if each > 1:  # the head takes the images of a text one after the other
            states, valid = (x.reshape(-1, each, *x.shape[1:]).transpose(1, 2).flatten(0, 1) for x in (states, valid))
        logits = model.heads[task](states.flatten(0, 1), valid.flatten(0, 1))
        losses[task] = F.cross_entropy(logits.float(), targets[task])
    return losses


def run_pretrain(config: PretrainConfig) -> None:
    """Trains a model from scratch, and says where it is."""
    print(f"wrote {pretrain(config, lambda line: print(line, flush=True))}")
