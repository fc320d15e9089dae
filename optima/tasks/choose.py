"""Which data a command works on: its configuration, and the data set that it names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from optima.coca import CoCaConfig
from optima.data.loader import LoaderConfig
from optima.data.records import ANSWERS, FORMATS
from optima.data.tokenizer import named_tokenizer
from optima.task import Task
from optima.tasks.data import TaskData
from optima.tasks.official import OfficialSplits, OfficialTask
from optima_core.errors import OptimaError

CLIP_TOKENS = 49408

UNSCORABLE_TESTS = ("coco", "vqav2")
"""Data sets whose test split has no published truth; their validation split stands in for it."""


@dataclass(frozen=True)
class DataConfig:
    """Which pictures and texts.

    Attributes:
        name: "pictograms" needs no files; the others are official data sets as downloaded, and "folder" one's own
            pictures with captions. Each serves one task.
        root: Data root of any but pictograms; `prepare` checks it.
        train: Split to train on.
        validation: Split of the learning curve and the probe.
        test: Split of the final scores; null takes "test", or "validation" where test answers are not published.
        tokenizer: "clip" is CLIP's, "words" the word list of pictograms; or a file: a SentencePiece .model, CLIP's byte
            pairs (.txt.gz), a JSON object from word to id. null takes clip for a model of its 49408 tokens, else words.
            Pictograms have their own.
        text_length: Tokens in a row of text, start and end included; longer texts are cut. 0 takes the teacher's most.
        answers: Size of VQAv2's answer vocabulary, the most frequent ones of its training split.
        loader: How pictures are loaded; transform.image_size is replaced by the teacher's picture size.
    """

    name: Literal["pictograms", "coco", "coco_karpathy", "vqav2", "nlvr2", "snli_ve", "folder"] = "pictograms"
    root: Path | None = None
    train: str = "train"
    validation: str = "validation"
    test: str | None = None
    tokenizer: str | None = None
    text_length: int = 0
    answers: int = ANSWERS
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if self.name == "pictograms" and self.root is not None:
            raise ValueError(f"root {self.root} is given, but pictograms have none; give a data name, too")
        if self.name != "pictograms" and self.root is None:
            raise ValueError(f"root, the folder that {self.name} was downloaded to, must be given")
        if self.text_length < 0 or self.answers < 1:
            raise ValueError(
                f"text_length must be at least 0 and answers at least 1, got {self.text_length} and {self.answers}"
            )


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
