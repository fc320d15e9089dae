"""Where rows come from: a data set that is read by number, or one that is read as it comes.

Either gives training rows by their place in an order without end, which is a pure function of the seed, and the held
ones: of every so many rows one, never trained on.
"""

import contextlib
import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from optima.commands.distill_hf.rows import Row, read_row
from optima_core.errors import OptimaError

_SHAPES = ({"messages"}, {"question", "answer"}, {"caption"}, {"text"})
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BUFFER = 1000
"""Rows of a stream that wait to be drawn."""


class Source(Protocol):
    """The rows of a data set. held: how many are held out."""

    held: int

    def train(self, start: int, size: int) -> list[Row]:
        """The training rows start, ..., start + size - 1 of all epochs, one after the other."""

    def held_rows(self, start: int, size: int) -> list[Row]:
        """Held rows, fewer at the end."""


class Rows:
    """A data set by number; each epoch has an order of its own.

    Raises OptimaError if it is missing, is of no known kind, its columns are of no known shape, or fewer than `least`
    of its rows are left to train on.
    """

    def __init__(self, path: Path, *, held_every: int, seed: int, least: int = 1) -> None:
        self._path, self._seed = path, seed
        self._rows = _open(path, streaming=False)
        _refuse_unknown_columns(path, self._rows.column_names)
        numbers = range(len(self._rows))
        self._held = [number for number in numbers if number % held_every == 0]
        self._train = [number for number in numbers if number % held_every]
        self.held = len(self._held)
        if len(self._train) < least:
            raise OptimaError(
                f"data {path} has {len(self._rows)} rows; {least} are needed to fill a batch and one held out"
            )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def train(self, start: int, size: int) -> list[Row]:
        """As `Source.train`."""
        length = len(self._train)
        return [self._row(self._order(place // length)[place % length]) for place in range(start, start + size)]

    def held_rows(self, start: int, size: int) -> list[Row]:
        """As `Source.held_rows`."""
        return [self._row(number) for number in self._held[start : start + size]]

    def _row(self, number: int) -> Row:
        return read_row(self._rows[number], self._path, number)

    def _shuffled(self, epoch: int) -> list[int]:
        order = torch.randperm(len(self._train), generator=_generator(self._seed, epoch))
        return [self._train[i] for i in order.tolist()]


class Stream:
    """A data set as it comes, shuffled in a buffer. What lies behind is read anew: a resumed run reads up to its place.

    held: The held rows that are kept, which are the first.

    Raises OptimaError as `Rows`.
    """

    def __init__(self, path: Path, *, held_every: int, held: int, seed: int) -> None:
        self._path, self._every, self._seed = path, held_every, seed
        self._rows = _open(path, streaming=True)
        first = next(self._numbered(), None)
        _refuse_unknown_columns(path, [] if first is None else list(first[1]))
        kept = ((number, row) for number, row in self._numbered() if number % held_every == 0)
        self._held = list(itertools.islice(kept, held))
        self.held = len(self._held)
        self._place, self._coming = 0, self._endless()

    def train(self, start: int, size: int) -> list[Row]:
        """As `Source.train`."""
        if start < self._place:
            self._place, self._coming = 0, self._endless()
        found = list(itertools.islice(self._coming, start - self._place, start - self._place + size))
        self._place = start + size
        return [read_row(row, self._path, number) for number, row in found]

    def held_rows(self, start: int, size: int) -> list[Row]:
        """As `Source.held_rows`."""
        return [read_row(row, self._path, number) for number, row in self._held[start : start + size]]

    def _numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with _told(self._path):
            yield from enumerate(self._rows)

    def _endless(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for epoch in itertools.count():
            train = ((number, row) for number, row in self._numbered() if number % self._every)
            count = 0
            for count, row in enumerate(_through_buffer(train, _generator(self._seed, epoch)), 1):  # noqa: B007
                yield row
            if not count:
                raise OptimaError(f"data {self._path} has no row to train on beside the held ones")


def _through_buffer(rows: Iterator[Any], generator: torch.Generator) -> Iterator[Any]:
    """Each row leaves when a later one takes its place, the last ones in any order."""
    buffer = list(itertools.islice(rows, BUFFER))
    for row in rows:
        place = int(torch.randint(len(buffer), (), generator=generator))
        leaving, buffer[place] = buffer[place], row
        yield leaving
    for place in torch.randperm(len(buffer), generator=generator).tolist():
        yield buffer[place]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _refuse_unknown_columns(path: Path, columns: list[str]) -> None:
    if not any(shape <= set(columns) for shape in _SHAPES):
        raise OptimaError(
            f"data {path} has the columns {', '.join(sorted(columns)) or '(none)'}; one of these is needed: messages; "
            "question and answer; caption; text"
        )


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Around reading: what is wrong with a file, in a line."""
    try:
        yield
    except OptimaError:
        raise
    except Exception as error:  # the library raises many kinds of what is wrong with a file
        lines = str(error.__cause__ or error).strip().splitlines()
        raise OptimaError(f"data {path} cannot be read: {lines[0] if lines else type(error).__name__}") from error


def _open(path: Path, *, streaming: bool) -> Any:
    """The data set, whose images and sounds stay as they are in the files until a row is read."""
    import datasets

    datasets.disable_progress_bars()
    kind, given = _kind(path)
    with _told(path):
        found = datasets.load_dataset(kind, split="train", streaming=streaming, **given)
        for name, feature in (found.features or {}).items():
            if isinstance(feature, datasets.Image | datasets.Audio):
                found = found.cast_column(name, type(feature)(decode=False))
    return found


def _kind(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        raise OptimaError(f"data {path} does not exist; give a JSON Lines or parquet file, or a folder of images")
    if not path.is_dir():
        if path.suffix not in _KINDS:
            raise OptimaError(f"data {path} is neither .jsonl nor .parquet nor a folder of images")
        return _KINDS[path.suffix], {"data_files": str(path)}
    for suffix, kind in _KINDS.items():
        files = sorted(str(file) for file in path.glob(f"*{suffix}") if file.stem != "metadata")
        if files:
            return kind, {"data_files": files}
    return "imagefolder", {"data_dir": str(path)}
