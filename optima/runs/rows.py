"""What a run writes down, one schema for its writer and for every reader: rounds, the summary, samples, attention.

`plain` makes of any of them what JSON takes, `read` makes it again of that. A number that is not finite is written as
null. What was not recorded reads as NaN where a number is wanted, and as empty where an object is.
"""

import dataclasses
import json
import math
import types
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from optima.untrusted import shown
from optima_core.errors import OptimaError
from optima_core.records import RoundRecord

Model = Literal["teacher", "before", "after"]
MODELS: tuple[Model, ...] = get_args(Model)
"""Whose scores a summary holds: the teacher's, and the student's before and after distillation."""

TRANSFORMERS = "transformers"
"""The task of a run whose models are any of transformers, with its own losses."""

T = TypeVar("T")


@dataclass(frozen=True)
class Round(RoundRecord):
    """A row of metrics.jsonl: what happened in a round, and the seconds since the run began."""

    seconds: float

    @classmethod
    def of(cls, record: RoundRecord, seconds: float) -> "Round":
        """The row of a record."""
        return cls(**vars(record), seconds=seconds)

    @property
    def chosen(self) -> str:
        """The arm's name: its modules joined by "+"."""
        return "+".join(self.modules)

    @property
    def steps_per_second(self) -> float:
        """Optimiser steps a second since the run began, whatever else was done meanwhile."""
        return self.step / self.seconds if self.seconds > 0 else math.nan


@dataclass(frozen=True)
class LayerWork:
    """What choosing modules saved.

    layers_tapped: mean share of the student's layers that were tapped and went into layer losses; 1 would be all.
    step_seconds: median over rounds of the mean time of a step, by the modules distilled.
    """

    layers_tapped: float = math.nan
    step_seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """summary.json: what a distillation came to.

    scores: by model ("teacher", "before", "after") and metric. parameters, images_per_second: of "teacher" and
    "student", whose sizes and speed distillation does not change. learning_curve: points of "step" and the headline
    metric on validation items. losses: whether the scores are losses, of which a lower one is better. scored_on: what
    the scores are measured on.
    """

    task: str
    scores: dict[str, dict[str, float]]
    headline_metric: str
    parameters: dict[str, int]
    images_per_second: dict[str, float]
    test_items: int = 0
    seconds: float = math.nan
    peak_mib: float = math.nan
    command: str = ""
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    layer_work: LayerWork = dataclasses.field(default_factory=LayerWork)
    learning_curve: tuple[dict[str, float], ...] = ()
    losses: bool = False
    scored_on: str = "test split"


@dataclass(frozen=True)
class Sample:
    """An entry of samples.json: a test item, and what each model said of it.

    images: PNG files, relative to the run directory. prompt: None for captioning. correct: by model.
    """

    images: tuple[str, ...]
    prompt: str | None
    reference: str
    teacher: str
    before: str
    after: str
    correct: dict[str, bool]


@dataclass(frozen=True)
class CrossAttention:
    """cross_attention.json: where each word of a caption looked.

    image: a PNG file, relative to the run directory. maps: for each word `grid` (rows, columns) weights.
    """

    image: str
    caption: tuple[str, ...]
    maps: tuple[tuple[tuple[float, ...], ...], ...]
    grid: tuple[int, ...]


def plain(value: Any) -> Any:
    """What JSON and YAML take: objects, lists, texts and numbers; of a dataclass, its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def parsed(text: str, where: str) -> Any:
    """The value that JSON `text` stands for. Raises OptimaError, which opens with `where`, if it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        place = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise OptimaError(f"{where}: not JSON: {place}") from None
    except RecursionError:
        raise OptimaError(f"{where}: not JSON: nested too deeply") from None


def read(kind: type[T], value: object, where: str) -> T:
    """A dataclass of parsed JSON; what it does not know of is ignored.

    Raises OptimaError, which opens with `where` and names the entry, if something is missing or of another type.
    """
    if not isinstance(value, dict):
        raise OptimaError(f"{where}: expected an object, got {as_json(value)}")
    hints, found = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint, given = hints[field.name], value.get(field.name)
        if given is not None:
            found[field.name] = _value(hint, given, field.name, where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            found[field.name] = _absent(hint, field.name, where)
    return kind(**found)


_WANTED: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a text"),
    bool: (bool, "true or false"),
    dict: (dict, "an object"),
    tuple: (list, "a list"),
}


def _absent(hint: Any, name: str, where: str) -> Any:
    if hint is float:
        return math.nan
    if get_origin(hint) is dict:
        return {}
    if _optional(hint):
        return None
    raise OptimaError(f"{where}: no {name!r}; {_WANTED[get_origin(hint) or hint][1]} is needed")


def _value(hint: Any, given: object, name: str, where: str) -> Any:
    if hint is Any:
        return given
    if _optional(hint):
        hint = get_args(hint)[0]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read(hint, given, f"{where}, {name!r}")
    kind, wanted = _WANTED[get_origin(hint) or hint]
    if not isinstance(given, kind) or (isinstance(given, bool) and hint is not bool):
        raise OptimaError(f"{where}: {name!r} is {as_json(given)}, not {wanted}")
    if isinstance(given, dict):
        inner = get_args(hint)[1]
        return {key: _value(inner, x, key, f"{where}, {name!r}") for key, x in given.items() if x is not None}
    if isinstance(given, list):
        inner = get_args(hint)[0]
        if inner is str and not all(isinstance(item, str) for item in given):
            raise OptimaError(f"{where}: {name!r} is {as_json(given)}, not a list of texts")
        return tuple(_value(inner, item, name, where) for item in given)
    return float(given) if isinstance(given, int | float) and hint is float else given


def _optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def as_json(value: object) -> str:
    """A value of JSON as a message has room for it."""
    return shown(json.dumps(value, ensure_ascii=False, default=str), 80)
