"""What distillation, fine-tuning, evaluation and the report ask of a data set, whichever it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from optima.coca import HeadSpec
from optima.data.config import Held
from optima.data.tokenizer import Tokenizer
from optima.task import TASKS, Task
from optima.tasks.batches import TaskBatch


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, and for each item its place in the split, the prediction in words, and whether that is right.

    Scores are in percent; CIDEr-D, which has no upper bound of 100, is multiplied by 100 as papers print it. There are
    none for a split without published truth.
    """

    scores: dict[str, float]
    indices: list[int]
    predictions: list[str]
    correct: list[bool]


class HeldBatch(NamedTuple):
    """Items of a held-out split: their places in it, and the batch. Items whose images are unusable are not there."""

    indices: list[int]
    batch: TaskBatch


@dataclass(frozen=True)
class Shown:
    """A held-out item as a person sees it.

    images: uint8 [3, H, W] each. prompt: question, statement or hypothesis; None for captioning. reference: what
    would be right.
    """

    images: tuple[NDArray[np.uint8], ...]
    prompt: str | None
    reference: str


class TaskData(Protocol):
    """A data set in the role of one task.

    name: what messages call it.
    headline: the score that the task is judged by.
    image_size: side of the square images that batches hold, pixels.
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
    def image_size(self) -> int: ...
    @property
    def text_length(self) -> int: ...
    @property
    def classes(self) -> tuple[str, ...]: ...

    def training_batch(self, number: int, size: int) -> TaskBatch:
        """Training batch number `number` of this rank, a pure function of number, size, seed and rank."""

    def probe_batch(self, size: int) -> TaskBatch:
        """The first `size` validation items with known truth, as evaluation shows them; fewer if there are fewer."""

    def held_batch(self, split: Held, indices: Sequence[int]) -> TaskBatch:
        """Certain items of a held-out split, as evaluation shows them: nothing is drawn."""

    def held_batches(
        self, split: Held, size: int, limit: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[HeldBatch]:
        """The items of a held-out split in order; `limit` > 0 takes only that many from its beginning.

        share: (rank, ranks) takes every ranks-th batch alone, from number `rank` on.
        """

    def unused(self, split: Held) -> int:
        """How many items of a held-out split cannot be used, as far as it was read: no score speaks of them."""

    def has_truth(self, split: Held) -> bool:
        """Whether predictions for a held-out split can be scored: its captions, answers or labels are known."""

    def score(self, split: Held, indices: Sequence[int], predictions: Sequence[str]) -> Evaluation:
        """Scores one prediction for each of some items of a split, by the task's own definitions."""

    def submission(self, split: Held, indices: Sequence[int], predictions: Sequence[str]) -> tuple[str, str]:
        """Name and content of a file of predictions, in the benchmark's submission format where it has one."""

    def shown(self, split: Held, index: int) -> Shown:
        """One item for a person's eyes."""

    def close(self) -> None:
        """Ends what loads batches ahead; a later batch starts it again."""


def head_spec(data: TaskData) -> HeadSpec | None:
    """The classification head that the task wants of a CoCa; None for captioning, which uses the vocabulary."""
    if not data.classes:
        return None
    return HeadSpec(len(data.classes), images=TASKS[data.task].images)


def percent(outcomes: Sequence[bool | float]) -> float:
    """The mean outcome in percent."""
    return 100 * sum(outcomes) / len(outcomes)
