"""The data set that a command's configuration names, in the role of its task."""

from pathlib import Path

import torch

from optima.coca import CoCaConfig
from optima.data.config import DataConfig
from optima.data.records import FORMATS
from optima.data.tokenizers import named_tokenizer
from optima.task import Task
from optima.tasks.data import TaskData
from optima.tasks.official import OfficialSplits, OfficialTask
from optima_core.errors import OptimaError

CLIP_TOKENS = 49408

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
    report: Path | None = None,
) -> TaskData:
    """The data set in the role of the task.

    Args:
        config: which.
        task: the role.
        model: the model to which pictures and texts of other data than pictograms are fitted.
        seed: of the training stream.
        device: where batches are wanted.
        rank: this process.
        world_size: number of processes, which share the training items.
        report: file to which unusable pictures are appended.

    Raises OptimaError if the data set does not serve the task, or cannot be read.
    """
    if config.name == "pictograms":
        from optima.tasks.pictograms import PictogramTask

        return PictogramTask(task, seed, device, rank, world_size)
    served = FORMATS[config.name].task
    if served != task:
        raise OptimaError(f"data {config.name} serves task {served}, not {task}; give --task {served}")
    assert config.root is not None
    test = config.test or ("validation" if config.name in UNSCORABLE_TESTS else "test")
    return OfficialTask(
        config.name,
        config.root,
        OfficialSplits(config.train, config.validation, test),
        config.loader,
        named_tokenizer(config.tokenizer or ("clip" if model.text_decoder.vocab_size == CLIP_TOKENS else "words")),
        picture_size=model.image_encoder.image_size,
        text_length=config.text_length or model.text_decoder.context_length,
        answers=config.answers,
        seed=seed,
        device=device,
        rank=rank,
        world_size=world_size,
        report=report,
    )
