"""Reads what a run left behind.

Required are config.yaml, metrics.jsonl and summary.json; samples.json and cross_attention.json are optional. Every
fault is an OptimaError that names the file (and the line of metrics.jsonl), what stands there and what would be right,
because the reader of a report is rarely the writer of the run.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optima.plain_yaml import load_yaml
from optima.runs.rows import MODELS, TRANSFORMERS, CrossAttention, Round, Sample, Summary, as_json, parsed, read
from optima_core.errors import OptimaError

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
SAMPLES, CROSS_ATTENTION = "samples.json", "cross_attention.json"
"""Files of a run directory."""


@dataclass(frozen=True)
class Run:
    """Everything that is shown of one run directory; images are full paths."""

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
    """Reads the directory of a finished run.

    Raises OptimaError if the directory or a required file is missing, or a file does not say what it must.
    """
    if not path.is_dir():
        raise OptimaError(f"run directory {path} does not exist; give one that `distill` wrote")
    config_text = _text(path / CONFIG)
    config = load_yaml(config_text, str(path / CONFIG))
    rounds = read_rounds(path / METRICS)
    if not rounds:
        raise OptimaError(f"{path / METRICS} holds no round; the run ended before its first round did")
    return Run(
        path=path,
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        rounds=rounds,
        summary=read_summary(path / SUMMARY),
        samples=_samples(path / SAMPLES),
        cross_attention=_cross_attention(path / CROSS_ATTENTION),
    )


def read_running(path: Path) -> Run:
    """Reads the directory of a run that goes on: what is there so far; its scores are not.

    Raises OptimaError if the directory is missing, or a file does not say what it must.
    """
    if not path.is_dir():
        raise OptimaError(f"run directory {path} does not exist; give one that `distill` writes to")
    config_text = _text(path / CONFIG) if (path / CONFIG).exists() else ""
    config = load_yaml(config_text, str(path / CONFIG)) if config_text else {}
    options = config if isinstance(config, dict) else {}
    lines = _text(path / METRICS).split("\n")[:-1] if (path / METRICS).exists() else []  # the last may be half written
    return Run(
        path=path,
        config=options,
        config_text=config_text,
        rounds=tuple(read_round(line, f"{path / METRICS} line {place}") for place, line in enumerate(lines, 1) if line),
        summary=Summary(str(options.get("task", TRANSFORMERS if options else "captioning")), {}, "", {}, {}),
        samples=(),
        cross_attention=None,
    )


def read_rounds(path: Path) -> tuple[Round, ...]:
    """The rows of a metrics.jsonl. Raises OptimaError naming the first line that is none."""
    lines = enumerate(_text(path).splitlines(), 1)
    return tuple(read_round(line, f"{path} line {number}") for number, line in lines if line.strip())


def read_round(line: str, where: str) -> Round:
    """One row. Raises OptimaError, which opens with `where`, if it is none."""
    return read(Round, parsed(line, where), where)


def read_summary(path: Path) -> Summary:
    """A summary.json. Raises OptimaError if it is missing or malformed."""
    summary = read(Summary, parsed(_text(path), str(path)), str(path))
    for model in MODELS:
        scores = summary.scores.get(model, {})
        if summary.headline_metric not in scores:
            raise OptimaError(
                f"{path}: headline_metric {summary.headline_metric!r} is not among the {model}'s scores "
                f"({', '.join(scores) or 'nothing'})"
            )
    return summary


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would keep the reader waiting
        raise OptimaError(f"{path} is no plain file")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OptimaError(f"{path} is missing; a run directory that `distill` finished holds it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptimaError(f"{path} cannot be read: {error}") from None


def _samples(path: Path) -> tuple[Sample, ...]:
    if not path.exists():
        return ()
    rows = parsed(_text(path), str(path))
    if not isinstance(rows, list):
        raise OptimaError(f"{path}: expected a list, got {as_json(rows)}")
    samples = []
    for number, row in enumerate(rows):
        where = f"{path} entry {number}"
        sample = read(Sample, row, where)
        for model in MODELS:
            if model not in sample.correct:
                raise OptimaError(f"{where}, 'correct': no {model!r}; true or false is needed")
        images = tuple(_image(path.parent, name, where) for name in sample.images)
        samples.append(dataclasses.replace(sample, images=images))
    return tuple(samples)


def _cross_attention(path: Path) -> CrossAttention | None:
    if not path.exists():
        return None
    found = read(CrossAttention, parsed(_text(path), str(path)), str(path))
    if len(found.grid) != 2 or min(found.grid) < 1:
        raise OptimaError(f"{path}: 'grid' is {as_json(found.grid)}, not [rows, columns]")
    if len(found.maps) != len(found.caption):
        raise OptimaError(f"{path}: {len(found.maps)} maps for {len(found.caption)} words; one map a word is needed")
    rows, columns = found.grid
    for word, table in zip(found.caption, found.maps, strict=True):
        if len(table) != rows or not all(len(row) == columns and all(map(math.isfinite, row)) for row in table):
            raise OptimaError(f"{path}: the map of {word!r} is not {rows} rows of {columns} numbers")
    return dataclasses.replace(found, image=_image(path.parent, found.image, str(path)))


def _image(root: Path, name: str, where: str) -> str:
    """The PNG called `name`, which must lie inside the run directory: a report is passed on, other files are not."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise OptimaError(f"{where}: image {name!r} lies outside the run directory")
    if not path.is_file():
        raise OptimaError(f"{where}: image {name!r} is not in the run directory")
    return str(path)
