"""The words of a run: what its student reads and says, kept beside the student so that it can be used without the data.

words.json holds the task, the tokenizer, the length of a text, the answers by class, and how a picture becomes the
square that the student was trained on.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from optima.data.config import TransformConfig
from optima.data.tokenizer import Tokenizer
from optima.data.tokenizers import tokenizer_from_json
from optima.runs.directory import RunDirectory
from optima.task import TASKS, Task
from optima.tasks.data import TaskData
from optima_core.errors import OptimaError

NAME = "words.json"


@dataclass(frozen=True)
class Words:
    """What a student of one task reads and says; `classes` is empty for captioning. transform: of its pictures."""

    task: Task
    tokenizer: Tokenizer
    text_length: int
    classes: tuple[str, ...]
    transform: TransformConfig


def write_words(directory: RunDirectory, data: TaskData, transform: TransformConfig) -> None:
    """Writes words.json of a run on the data, whose pictures went through the transform."""
    directory.write_json(
        NAME,
        {
            "task": data.task,
            "text_length": data.text_length,
            "classes": list(data.classes),
            "tokenizer": data.tokenizer.to_json(),
            "transform": asdict(replace(transform, image_size=data.picture_size)),
        },
    )


def read_words(run: Path) -> Words:
    """Raises OptimaError if the run directory has no readable words.json."""
    path = run / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["task"] not in TASKS:
            raise ValueError(f"unknown task {values['task']}")
        return Words(
            values["task"],
            tokenizer_from_json(values["tokenizer"]),
            int(values["text_length"]),
            tuple(values["classes"]),
            TransformConfig(**values["transform"]),
        )
    except FileNotFoundError:
        raise OptimaError(f"{path} does not exist; give the directory of a run that `distill` finished") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OptimaError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
