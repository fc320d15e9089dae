"""The words of a run: what its student reads and says, kept beside the student so that it can be used without the data.

words.json holds the task, the tokenizer, the length of a text, the answers by class, how an image becomes the square
that the student was trained on, and how sure of its captions it usually is.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from optima.data.config import TransformConfig
from optima.data.tokenizer import Tokenizer
from optima.data.tokenizers import tokenizer_from_json
from optima.limits import MAX_TEXT_LENGTH, MAX_VOCABULARY_BYTES
from optima.runs.directory import RunDirectory
from optima.sizes import whole_number
from optima.task import TASKS, Task
from optima.tasks.data import TaskData
from optima.untrusted import read_json, shown
from optima_core.errors import OptimaError

NAME = "words.json"


@dataclass(frozen=True)
class Words:
    """What a student of one task reads and says; `classes` is empty for captioning. transform: of its images.

    usual: mean token probability that its captions usually reach (`optima.runs.confidence`); None if it was not looked
    at.
    """

    task: Task
    tokenizer: Tokenizer
    text_length: int
    classes: tuple[str, ...]
    transform: TransformConfig
    usual: float | None = None


def write_words(
    directory: RunDirectory, data: TaskData, transform: TransformConfig, usual: float | None = None
) -> None:
    """Writes words.json of a run on the data, whose images went through the transform."""
    directory.write_json(
        NAME,
        {
            "task": data.task,
            "text_length": data.text_length,
            "classes": list(data.classes),
            "tokenizer": data.tokenizer.to_json(),
            "transform": asdict(replace(transform, image_size=data.image_size)),
            "usual": usual,
        },
    )


def words_beside(weights: Path) -> Words | None:
    """The words.json beside weights; None if there is none."""
    return read_words(weights.parent) if (weights.parent / NAME).exists() else None


def refuse_other_words(weights: Path, data: TaskData) -> None:
    """Raises OptimaError if weights were trained with another vocabulary than the data's, by the words.json beside."""
    known = words_beside(weights)
    if known is not None and known.tokenizer.to_json() != data.tokenizer.to_json():
        raise OptimaError(
            f"{weights} was trained with the vocabulary of {weights.parent / NAME}, which is not that of {data.name} "
            "now; finetune it on these texts first, or give the tokenizer it was trained with as --data.tokenizer"
        )


def read_words(run: Path) -> Words:
    """Raises OptimaError if the run directory has no readable words.json."""
    path = run / NAME
    if not path.exists():
        raise OptimaError(f"{path} does not exist; give the directory of a run that `distill` finished")
    values = read_json(path, "words", MAX_VOCABULARY_BYTES)
    try:
        if not isinstance(values["task"], str) or values["task"] not in TASKS:
            raise ValueError(f"unknown task {values['task']!r:.80}")
        classes = values["classes"]
        if not isinstance(classes, list) or not all(isinstance(word, str) for word in classes):
            raise ValueError(f"classes must be a list of texts, got {classes!r:.80}")
        return Words(
            values["task"],
            tokenizer_from_json(values["tokenizer"]),
            whole_number(values["text_length"], "text_length", 2, MAX_TEXT_LENGTH),
            tuple(classes),
            TransformConfig(**values["transform"]),
            _share(values.get("usual")),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OptimaError(f"{path} cannot be read ({shown(' '.join(str(error).split()))})") from None


def _share(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"usual must be a number within 0..1, got {value!r:.80}")
    return float(value)
