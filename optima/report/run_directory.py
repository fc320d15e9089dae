"""Reads what a run left behind: the one place of the report that knows the files of a run directory.

Required are `config.yaml`, `metrics.jsonl` and `summary.json`; `samples.json` and `cross_attention.json` are optional.
Every fault is a `ValueError` of one line that names the file (and the line of `metrics.jsonl`), what stands there and
what would be right, because the reader of a report is rarely the writer of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MODELS = ("teacher", "before", "after")


@dataclass(frozen=True)
class Round:
    """One line of `metrics.jsonl`: a round of the bandit.

    `arm` is the chosen arm's name (its modules joined by "+"); `posterior_mean` and `posterior_std` are empty until
    every arm was tried; `losses` are training means of the round, `probe` the probe losses after it, both by loss name
    such as "task", "logits" or "hidden/image_encoder/0". `seconds` counts wall-clock time since the run began. NaN
    stands for "not recorded".
    """

    number: int
    step: int
    modules: tuple[str, ...]
    reward: float
    posterior_mean: Mapping[str, float]
    posterior_std: Mapping[str, float]
    losses: Mapping[str, float]
    probe: Mapping[str, float]
    learning_rate: float
    seconds: float
    steps_per_second: float

    @property
    def arm(self) -> str:
        return "+".join(self.modules)


@dataclass(frozen=True)
class Summary:
    """`summary.json`: what the run came to. `scores` holds metric -> value for "teacher", "before" and "after"."""

    task: str
    scores: Mapping[str, Mapping[str, float]]
    headline_metric: str
    parameters: Mapping[str, int]
    images_per_second: Mapping[str, float]
    seconds: float
    peak_mib: float
    command: str
    environment: Mapping[str, Any]
    learning_curve: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Sample:
    """One test example with what the teacher and the student, before and after, said; `images` are PNG files."""

    images: tuple[Path, ...]
    prompt: str | None
    reference: str
    answers: Mapping[str, str]
    correct: Mapping[str, bool]


@dataclass(frozen=True)
class CrossAttention:
    """Where each word of a caption looked: `maps` holds a row-major list of `grid` (rows, columns) weights per word."""

    image: Path
    caption: tuple[str, ...]
    maps: tuple[tuple[tuple[float, ...], ...], ...]
    grid: tuple[int, int]


@dataclass(frozen=True)
class Run:
    """Everything the report shows of one run directory."""

    path: Path
    config: Mapping[str, Any]
    config_text: str
    rounds: tuple[Round, ...]
    summary: Summary
    samples: tuple[Sample, ...]
    cross_attention: CrossAttention | None

    @property
    def data(self) -> str:
        """Name of the data set; runs on pictograms need not say theirs."""
        options = self.config.get("data")
        return str(options.get("name", "pictograms")) if isinstance(options, dict) else "pictograms"


def read_run(path: Path) -> Run:
    """Reads a run directory.

    Raises:
        ValueError: the directory or a required file is missing, or a file does not say what it must.
    """
    if not path.is_dir():
        raise ValueError(f"run directory {path} does not exist; give one that `distill` wrote")
    config_text = _read_text(path / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path / 'config.yaml'}: not YAML: {' '.join(str(error).split())}") from None
    return Run(
        path=path,
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        rounds=_read_rounds(path / "metrics.jsonl"),
        summary=_read_summary(path / "summary.json"),
        samples=_read_samples(path / "samples.json"),
        cross_attention=_read_cross_attention(path / "cross_attention.json"),
    )


class _Fields:
    """A JSON object with typed access; `where` opens every complaint."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {_shown(value)}")
        self.value: dict[str, Any] = value
        self.where = where

    def get(self, key: str, kind: type, wanted: str, default: Any = None) -> Any:
        """The value at `key`; `default` stands in for absent or null, and None as `default` makes the key required."""
        value = self.value.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise ValueError(f"{self.where}: no {key!r}; {wanted} is needed")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: {key!r} is {_shown(value)}, not {wanted}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return float(self.get(key, int | float, "a number", default))  # type: ignore[arg-type]

    def integer(self, key: str) -> int:
        return int(self.get(key, int, "a whole number"))

    def text(self, key: str, default: str | None = None) -> str:
        return str(self.get(key, str, "a text", default))

    def items(self, key: str, default: list[Any] | None = None) -> list[Any]:
        return list(self.get(key, list, "a list", default))

    def texts(self, key: str) -> tuple[str, ...]:
        found = self.items(key)
        if not all(isinstance(item, str) for item in found):
            raise ValueError(f"{self.where}: {key!r} is {_shown(found)}, not a list of texts")
        return tuple(found)

    def object(self, key: str, default: dict[str, Any] | None = None) -> _Fields:
        return _Fields(self.get(key, dict, "an object", default), f"{self.where}, {key!r}")

    def numbers(self) -> dict[str, float]:
        """Every entry of this object as a number; null entries are left out."""
        return {key: self.number(key) for key, value in self.value.items() if value is not None}


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would keep the reader waiting
        raise ValueError(f"{path} is no plain file")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; a run directory that `distill` finished holds it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None


def _read_rounds(path: Path) -> tuple[Round, ...]:
    lines = _read_text(path).splitlines()
    rounds = tuple(
        _round(_Fields(_parse(line, where), where))
        for line, where in ((line, f"{path} line {number}") for number, line in enumerate(lines, 1))
        if line.strip()
    )
    if not rounds:
        raise ValueError(f"{path} holds no round; the run ended before its first round did")
    return rounds


def _round(row: _Fields) -> Round:
    posterior = row.object("posterior", {})
    return Round(
        number=row.integer("round"),
        step=row.integer("step"),
        modules=row.texts("modules"),
        reward=row.number("reward", math.nan),
        posterior_mean=posterior.object("mean", {}).numbers(),
        posterior_std=posterior.object("std", {}).numbers(),
        losses=row.object("losses", {}).numbers(),
        probe=row.object("probe", {}).numbers(),
        learning_rate=row.number("learning_rate", math.nan),
        seconds=row.number("seconds", math.nan),
        steps_per_second=row.number("steps_per_second", math.nan),
    )


def _read_summary(path: Path) -> Summary:
    fields = _Fields(_parse(_read_text(path), str(path)), str(path))
    scores = fields.object("scores")
    by_model = {model: scores.object(model).numbers() for model in MODELS}
    headline = fields.text("headline_metric")
    for model, metrics in by_model.items():
        if headline not in metrics:
            known = ", ".join(metrics) or "nothing"
            raise ValueError(f"{path}: headline_metric {headline!r} is not among the {model}'s scores ({known})")
    return Summary(
        task=fields.text("task"),
        scores=by_model,
        headline_metric=headline,
        parameters={name: int(value) for name, value in fields.object("parameters", {}).numbers().items()},
        images_per_second=fields.object("images_per_second", {}).numbers(),
        seconds=fields.number("seconds", math.nan),
        peak_mib=fields.number("peak_mib", math.nan),
        command=fields.text("command", ""),
        environment=fields.object("environment", {}).value,
        learning_curve=tuple(
            _Fields(point, f"{path}, 'learning_curve'").numbers() for point in fields.items("learning_curve", [])
        ),
    )


def _read_samples(path: Path) -> tuple[Sample, ...]:
    if not path.exists():
        return ()
    rows = _parse(_read_text(path), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list, got {_shown(rows)}")
    return tuple(_sample(_Fields(row, f"{path} entry {number}"), path.parent) for number, row in enumerate(rows))


def _sample(row: _Fields, root: Path) -> Sample:
    correct = row.object("correct", {})
    return Sample(
        images=tuple(_picture(root, name, row.where) for name in row.texts("images")),
        prompt=row.text("prompt", "") or None,
        reference=row.text("reference"),
        answers={model: row.text(model) for model in MODELS},
        correct={model: bool(correct.get(model, bool, "true or false")) for model in MODELS},
    )


def _read_cross_attention(path: Path) -> CrossAttention | None:
    if not path.exists():
        return None
    fields = _Fields(_parse(_read_text(path), str(path)), str(path))
    caption, maps, grid = fields.texts("caption"), fields.items("maps"), fields.items("grid")
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise ValueError(f"{path}: 'grid' is {_shown(grid)}, not [rows, columns]")
    if len(maps) != len(caption):
        raise ValueError(f"{path}: {len(maps)} maps for {len(caption)} words; one map a word is needed")
    rows, columns = grid
    for word, table in zip(caption, maps, strict=True):
        if not _is_table(table, rows, columns):
            raise ValueError(f"{path}: the map of {word!r} is not {rows} rows of {columns} numbers")
    return CrossAttention(
        image=_picture(path.parent, fields.text("image"), str(path)),
        caption=caption,
        maps=tuple(tuple(tuple(float(x) for x in row) for row in table) for table in maps),
        grid=(rows, columns),
    )


def _is_table(table: object, rows: int, columns: int) -> bool:
    return (
        isinstance(table, list)
        and len(table) == rows
        and all(isinstance(row, list) and len(row) == columns and _all_numbers(row) for row in table)
    )


def _all_numbers(values: Iterable[object]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _picture(root: Path, name: str, where: str) -> Path:
    """The PNG called `name`, which must lie inside the run directory: a report is passed on, other files are not."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{where}: picture {name!r} lies outside the run directory")
    if not path.is_file():
        raise ValueError(f"{where}: picture {name!r} is not in the run directory")
    return path
