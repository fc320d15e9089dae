"""What distillation, fine-tuning, evaluation and the report ask of a data set, whichever it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from optima.coca import HeadSpec
from optima.data.pictograms.stream import Task
from optima.data.tokenizer import Tokenizer
from optima.tasks.batches import TaskBatch

Held = Literal["validation", "test"]
"""The two roles that held-out items play: points of the learning curve, and final scores."""


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, and each item's prediction in words with whether it is right.

    Scores are in percent; CIDEr-D, which has no upper bound of 100, is multiplied by 100 as papers print it.
    """

    scores: dict[str, float]
    predictions: list[str]
    correct: list[bool]


@dataclass(frozen=True)
class Shown:
    """A held-out item as a person sees it.

    pictures: uint8 [3, H, W] each. prompt: question, statement or hypothesis; None for captioning. reference: what
    would be right.
    """

    pictures: tuple[NDArray[np.uint8], ...]
    prompt: str | None
    reference: str


class TaskData(Protocol):
    """A data set in the role of one task.

    name: what messages call it.
    headline: the score that the task is judged by.
    picture_size: side of the square pictures that batches hold, pixels.
    text_length: tokens in a row of text, start and end included.
    classes: the names of the classes by index; empty for captioning.
    """

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> Task: ...
    @property
    def headline(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def picture_size(self) -> int: ...
    @property
    def text_length(self) -> int: ...
    @property
    def classes(self) -> tuple[str, ...]: ...

    def training_batch(self, step: int, size: int) -> TaskBatch:
        """The batch of an optimiser step, a pure function of the step, the size and the seed."""

    def held_batch(self, split: Held, start: int, size: int) -> TaskBatch:
        """Items start, ..., start + size - 1 of a held-out split, as evaluation shows them: nothing is drawn."""

    def items(self, split: Held) -> int:
        """Number of items of a held-out split."""

    def score(self, split: Held, predictions: Sequence[str]) -> Evaluation:
        """Scores predictions for the first items of a split, one each, by the task's own definitions."""

    def shown(self, split: Held, index: int) -> Shown:
        """One item for a person's eyes."""


def head_spec(data: TaskData) -> HeadSpec | None:
    """The classification head that the task wants of a CoCa; None for captioning, which uses the vocabulary."""
    if not data.classes:
        return None
    return HeadSpec(len(data.classes), pictures=2 if data.task == "nlvr2" else 1)


def percent(outcomes: Sequence[bool | float]) -> float:
    """The mean outcome in percent."""
    return 100 * sum(outcomes) / len(outcomes)
