"""The data set that a command's configuration names, in the role of its task."""

from pathlib import Path

import torch

from optima.coca import CoCaConfig
from optima.data.config import DataConfig
from optima.data.records import FORMATS, open_records
from optima.data.tokenizer import Tokenizer
from optima.data.tokenizers import named_tokenizer
from optima.data.vocabulary import MOST_TEXTS, text_tokenizer
from optima.task import Task
from optima.tasks.data import TaskData
from optima.tasks.official import OfficialSplits, OfficialTask
from optima_core.errors import OptimaError

CLIP_TOKENS = 49408

OWN_TEXTS = "texts"
"""The tokenizer that is a word list of the training split's texts."""

UNSCORABLE_TESTS = ("coco", "vqav2")
"""Data sets whose test split has no published truth; their validation split stands in for it."""


def open_data(
    config: DataConfig,
    task: Task,
    model: CoCaConfig,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    rank: int = 0,
    world_size: int = 1,
    rejected: Path | None = None,
    words: tuple[Tokenizer, int] | None = None,
) -> TaskData:
    """The data set in the role of the task.

    Args:
        config: which.
        task: the role.
        model: the model to which images and texts of other data than pictograms are fitted.
        seed: of the training stream.
        device: where batches are wanted.
        rank: this process.
        world_size: number of processes, which share the training items.
        rejected: file to which unusable images are appended.
        words: the tokenizer and the length of a text that the model was trained with, if they are known; they stand in
            for what the configuration leaves open, or would make of the texts.

    Raises OptimaError if the data set does not serve the task, or cannot be read.
    """
    if config.name == "pictograms":
        from optima.tasks.pictograms import PictogramTask

        return PictogramTask(task, seed, device, rank, world_size)
    served = FORMATS[config.name].task
    if served != task:
        raise OptimaError(f"data {config.name} serves task {served}, not {task}; give --task {served}")
    assert config.root is not None
    tokenizer, text_length = _words(config, model, words)
    test = config.test or ("validation" if config.name in UNSCORABLE_TESTS else "test")
    return OfficialTask(
        config.name,
        config.root,
        OfficialSplits(config.train, config.validation, test),
        config.loader,
        tokenizer,
        image_size=model.image_encoder.image_size,
        text_length=config.text_length or text_length,
        index=config.index,
        max_unknown=config.max_unknown,
        answers=config.answers,
        seed=seed,
        device=device,
        rank=rank,
        world_size=world_size,
        rejected=rejected,
    )


def _words(config: DataConfig, model: CoCaConfig, known: tuple[Tokenizer, int] | None) -> tuple[Tokenizer, int]:
    """The tokenizer, and the tokens of a row unless the configuration says."""
    if known is not None and config.tokenizer in (None, OWN_TEXTS):
        return known
    if config.tokenizer == OWN_TEXTS:
        assert config.name != "pictograms"
        assert config.root is not None
        records = open_records(
            config.name,
            config.root,
            config.train,
            max_rejected=config.loader.max_rejected,
            answers=config.answers,
            index=config.index,
        )
        return text_tokenizer(records.texts(MOST_TEXTS))
    named = config.tokenizer or ("clip" if model.text_decoder.vocab_size == CLIP_TOKENS else "words")
    return named_tokenizer(named), model.text_decoder.context_length
