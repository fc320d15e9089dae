"""The four tasks in one table: whoever must know how a task differs from the others asks here.

Imports the standard library alone, so that tasks can be named and checked before anything heavy is loaded.
"""

from dataclasses import dataclass
from typing import Literal

Task = Literal["captioning", "vqa", "nlvr2", "snli_ve"]

TRUTHS = ("false", "true")
"""NLVR2's classes, by index."""

LABELS = ("entailment", "neutral", "contradiction")
"""SNLI-VE's classes, by index."""


@dataclass(frozen=True)
class TaskSpec:
    """What a task is, on whatever data set.

    Attributes:
        title: For people.
        headline: The benchmark's score that a model is judged by.
        classes: The classes by index; () where texts are generated, None where each data set has its own answers.
        images: Images that one text speaks of.
        benchmark: The benchmark that the task is known by, where the title does not say it.
        mirrors: Whether an item stays true when its image is mirrored, unless its text names a side.
    """

    title: str
    headline: str
    classes: tuple[str, ...] | None
    images: int = 1
    benchmark: str = ""
    mirrors: bool = False


TASKS: dict[Task, TaskSpec] = {
    "captioning": TaskSpec("Captioning", "cider_d", (), mirrors=True),
    "vqa": TaskSpec("Visual question answering", "accuracy", None),
    "nlvr2": TaskSpec("Statements about two images", "accuracy", TRUTHS, images=2, benchmark="NLVR2"),
    "snli_ve": TaskSpec("Visual entailment", "accuracy", LABELS, benchmark="SNLI-VE", mirrors=True),
}


def title_on(task: Task, data: str) -> str:
    """The task on the data set of this name, for people: only a benchmark's own data bears the benchmark's name."""
    spec = TASKS[task]
    if not spec.benchmark:
        return spec.title
    return f"{spec.title} ({spec.benchmark})" if data == task else f"{spec.title} ({spec.benchmark}-shaped)"
