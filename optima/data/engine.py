"""What an engine of the loader is given, what it gives back, and what all of them share: reading images.

An engine chooses nothing: a job names the places in the stream, `ImageReader` reads their bytes and chooses their
windows.
"""

import abc
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optima.data.config import TransformConfig
from optima.data.draws import Draws
from optima.data.images import Header, inspect
from optima.data.order import Place
from optima.data.record import ImageSource, Records, Unusable
from optima.data.remote import in_turn
from optima.data.shard_index import IndexedRecords
from optima.data.transform import Window, evaluation_window, make_square, mirror_allowed, training_window
from optima.task import TASKS


class ImageBatch(NamedTuple):
    """images: uint8 [B, images, 3, S, S], see `optima.data.normalise`. indices: int64 [B], into the records.

    epochs: int64 [B], the epoch in which each record comes, for `Record.text_at`.
    """

    images: Tensor
    indices: Tensor
    epochs: Tensor


class Fault(NamedTuple):
    """An image that could not be used: which record, where, and `Unusable`'s fields."""

    record: int
    where: str
    kind: str
    reason: str


class Job(NamedTuple):
    """What an engine is asked for: places in the stream, and whether their windows are the training ones."""

    places: list[Place]
    training: bool


class Ready(NamedTuple):
    """An image whose bytes are read: its place in the batch (row, side), and what is to be made of it."""

    row: int
    side: int
    data: bytes
    header: Header
    window: Window


class ImageReader:
    """Reads the images of records and chooses their windows; cheap to copy into worker processes."""

    def __init__(self, records: Records, config: TransformConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.sides = len(records[0].images)
        self._records = len(records)
        self._images = _OfIndex(records) if isinstance(records.items, IndexedRecords) else _InArrays(records)

    def source(self, index: int, side: int) -> ImageSource:
        """Where an image of a record is."""
        return self._images.source(index, side)

    def read(self, place: Place, row: int, side: int, training: bool) -> Ready:
        """Reads an image and chooses its window. Raises Unusable."""
        return self.ready(place, row, side, training, self.source(place.record, side).read())

    def read_all(self, job: Job) -> Iterator[tuple[int, Place, int, bytes | Unusable]]:
        """The images of a job, or what is wrong with them: row, place, side; those of a network many at a time."""
        wanted = [(row, place, side) for row, place in enumerate(job.places) for side in range(self.sides)]
        sources = [self.source(place.record, side) for _, place, side in wanted]
        contents = in_turn(_content, sources, at_once=any(source.remote for source in sources))
        for (row, place, side), content in zip(wanted, contents, strict=True):
            yield row, place, side, content

    def ready(self, place: Place, row: int, side: int, training: bool, data: bytes | Unusable) -> Ready:
        """Chooses the window of an image that was read. Raises Unusable, or what was found in the image's place."""
        if isinstance(data, Unusable):
            raise data
        header = inspect(data)
        if not training:
            window = evaluation_window(header.width, header.height, self.config)
        else:
            draws = Draws(self.seed, (place.epoch * self._records + place.record) * self.sides + side)
            mirror = self.config.mirror and self._images.mirrors(place.record)
            window = training_window(header.width, header.height, self.config, draws, mirror)
        return Ready(row, side, data, header, window)

    def square(self, ready: Ready) -> Tensor:
        """The square of an image, uint8 [3, S, S]. Raises Unusable."""
        return make_square(ready.data, ready.header, ready.window, self.config)

    def fault(self, place: Place, side: int, fault: Unusable) -> Fault:
        """What is reported of an image."""
        return Fault(place.record, str(self.source(place.record, side)), fault.kind, fault.reason)


class _InArrays:
    """The images of records in memory, in arrays, since a worker that touches Python objects copies their memory."""

    def __init__(self, records: Records) -> None:
        paths = list(dict.fromkeys(source.path for record in records.items for source in record.images))
        number = {path: place for place, path in enumerate(paths)}
        encoded = [os.fsencode(path) for path in paths]
        self._paths = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *(len(path) for path in encoded)])
        self._sources = np.array(
            [
                [(number[s.path], s.offset, s.size, -1 if s.checksum is None else s.checksum) for s in record.images]
                for record in records.items
            ],
            dtype=np.int64,
        )
        self._mirror = np.array([mirror_allowed(records.task, record) for record in records.items])

    def source(self, index: int, side: int) -> ImageSource:
        path, offset, size, checksum = self._sources[index, side].tolist()
        name = os.fsdecode(self._paths[self._ends[path] : self._ends[path + 1]].tobytes())
        return ImageSource(name, offset, size, checksum if checksum >= 0 else None)

    def mirrors(self, index: int) -> bool:
        return bool(self._mirror[index])


class _OfIndex:
    """The images of records that are read from their index when they are wanted."""

    def __init__(self, records: Records) -> None:
        self._items = records.items
        self._task = records.task

    def source(self, index: int, side: int) -> ImageSource:
        return self._items[index].images[side]

    def mirrors(self, index: int) -> bool:
        return TASKS[self._task].mirrors and mirror_allowed(self._task, self._items[index])


def _content(source: ImageSource) -> bytes | Unusable:
    try:
        return source.read()
    except Unusable as fault:
        return fault


def assemble(
    places: Sequence[Place], images: Tensor, faults: Sequence[Fault], lost_rows: set[int]
) -> tuple[ImageBatch, tuple[Fault, ...]]:
    """The batch without its lost rows. images: uint8 [B, images, 3, S, S]."""
    indices = torch.tensor([place.record for place in places], dtype=torch.int64)
    epochs = torch.tensor([place.epoch for place in places], dtype=torch.int64)
    if lost_rows:
        kept = torch.tensor([row for row in range(len(places)) if row not in lost_rows], dtype=torch.int64)
        images, indices, epochs = images[kept.to(images.device)], indices[kept], epochs[kept]
    return ImageBatch(images, indices, epochs), tuple(faults)


class Engine(abc.ABC):
    """Runs jobs ahead of their use."""

    @abc.abstractmethod
    def run(self, jobs: Iterator[Job]) -> Iterator[tuple[ImageBatch, tuple[Fault, ...]]]:
        """The batches of the jobs, in order; jobs are drawn from the iterator ahead of their results."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends worker processes and threads."""
