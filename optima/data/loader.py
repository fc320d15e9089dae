"""Batches of pictures: `loader.load(step)` for training, `loader.once()` for an evaluation.

    records = open_records("vqav2", root, "train")
    with make_loader(records, LoaderConfig(), batch_size=32, seed=0) as loader:
        batch = loader.load(0)                      # images uint8 [32, 1, 3, S, S], indices, epochs
        texts = [records[i].text_at(e) for i, e in zip(batch.indices.tolist(), batch.epochs.tolist())]

What belongs to step s, which records (`optima.data.order`) and which part of each picture (`optima.data.transform`), is
a function of (seed, s, rank): `load` of consecutive steps comes from a pipeline that runs ahead, `load` of any other
step starts that pipeline anew there, and gives what an uninterrupted run would have given. There is no state to save.

Two engines do the work, and choose nothing, so they agree on every record and window, and on pixels up to decoders'
rounding:

- `torch`: torch's DataLoader, libjpeg-turbo through simplejpeg (Pillow where it is missing) and torch's resampling;
- `dali`: NVIDIA DALI, which decodes on the GPU where there is one.

"auto" takes DALI on a GPU if it is installed, else torch: on a CPU torch's engine is the faster one.

A picture that cannot be used leaves its batch one record smaller, is written to `rejected.jsonl` and counted; above
`max_rejected` of all records the run ends with an OptimaError. `prepare` finds them before.
"""

import abc
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from optima.data.images import Header, inspect
from optima.data.order import Order, Place
from optima.data.order import once as order_once
from optima.data.pictograms.draws import Draws
from optima.data.record import ImageSource, Records, Rejection, RejectionLog, Unusable
from optima.data.transform import (
    TransformConfig,
    Window,
    evaluation_window,
    mirror_allowed,
    picture,
    training_window,
)
from optima_core.errors import OptimaError

EngineName = Literal["auto", "torch", "dali"]


@dataclass(frozen=True)
class LoaderConfig:
    """How pictures are loaded.

    Attributes:
        engine: "torch", "dali", or "auto": DALI on a GPU where it is installed, else torch.
        workers: torch: processes that load ahead, 0 loads within the training process. DALI: its threads. -1 takes one
            for every CPU but one, at most 8.
        prefetch: Batches that are loaded ahead (torch: by each worker).
        max_rejected: Share of the records, 0 to 1, whose pictures may turn out unusable before the run ends.
        transform: From pictures to squares.
    """

    engine: EngineName = "auto"
    workers: int = -1
    prefetch: int = 2
    max_rejected: float = 0.01
    transform: TransformConfig = field(default_factory=TransformConfig)

    def __post_init__(self) -> None:
        if self.workers < -1 or self.prefetch < 1:
            raise ValueError(
                f"workers must be at least -1 and prefetch at least 1, got {self.workers} and {self.prefetch}"
            )
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"max_rejected must be within 0..1, got {self.max_rejected}")

    def worker_count(self) -> int:
        """`workers`, with -1 resolved for this machine."""
        return self.workers if self.workers >= 0 else max(0, min(8, len(os.sched_getaffinity(0)) - 1))


class PictureBatch(NamedTuple):
    """images: uint8 [B, pictures, 3, S, S], see `optima.data.pictures.normalise`. indices: int64 [B], into the records.
    epochs: int64 [B], the epoch in which each record comes, for `Record.text_at`."""

    images: Tensor
    indices: Tensor
    epochs: Tensor


class Fault(NamedTuple):
    """A picture that could not be used: which record, where, and `Unusable`'s fields."""

    record: int
    where: str
    kind: str
    reason: str


class Job(NamedTuple):
    """What an engine is asked for: places in the stream, and whether their windows are the training ones."""

    places: list[Place]
    training: bool


class Ready(NamedTuple):
    """A picture whose bytes are read: its place in the batch (row, side), and what is to be made of it."""

    row: int
    side: int
    data: bytes
    header: Header
    window: Window


class Pictures:
    """Reads the pictures of records and chooses their windows; cheap to copy into worker processes.

    The sources are kept in arrays, since a worker that touches Python objects copies the memory they lie in.
    """

    def __init__(self, records: Records, config: TransformConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.sides = len(records[0].images)
        paths = list(dict.fromkeys(source.path for record in records.items for source in record.images))
        number = {path: place for place, path in enumerate(paths)}
        encoded = [os.fsencode(path) for path in paths]
        self._paths = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *(len(path) for path in encoded)])
        self._sources = np.array(
            [[(number[s.path], s.offset, s.size) for s in record.images] for record in records.items], dtype=np.int64
        )
        self._mirror = np.array([mirror_allowed(records.task, record) for record in records.items]) & config.mirror

    def source(self, index: int, side: int) -> ImageSource:
        """Where a picture of a record is."""
        path, offset, size = self._sources[index, side].tolist()
        return ImageSource(os.fsdecode(self._paths[self._ends[path] : self._ends[path + 1]].tobytes()), offset, size)

    def read(self, place: Place, row: int, side: int, training: bool) -> Ready:
        """Reads a picture and chooses its window. Raises Unusable."""
        data = self.source(place.record, side).read()
        header = inspect(data)
        if not training:
            window = evaluation_window(header.width, header.height, self.config)
        else:
            draws = Draws(self.seed, (place.epoch * len(self._sources) + place.record) * self.sides + side)
            window = training_window(header.width, header.height, self.config, draws, bool(self._mirror[place.record]))
        return Ready(row, side, data, header, window)

    def square(self, ready: Ready) -> Tensor:
        """The square of a picture, uint8 [3, S, S]. Raises Unusable."""
        return picture(ready.data, ready.header, ready.window, self.config)

    def fault(self, place: Place, side: int, fault: Unusable) -> Fault:
        """What is reported of a picture."""
        return Fault(place.record, str(self.source(place.record, side)), fault.kind, fault.reason)


def assemble(
    places: Sequence[Place], images: Tensor, faults: Sequence[Fault], lost_rows: set[int]
) -> tuple[PictureBatch, tuple[Fault, ...]]:
    """The batch without its lost rows. images: uint8 [B, pictures, 3, S, S]."""
    indices = torch.tensor([place.record for place in places], dtype=torch.int64)
    epochs = torch.tensor([place.epoch for place in places], dtype=torch.int64)
    if lost_rows:
        kept = torch.tensor([row for row in range(len(places)) if row not in lost_rows], dtype=torch.int64)
        images, indices, epochs = images[kept.to(images.device)], indices[kept], epochs[kept]
    return PictureBatch(images, indices, epochs), tuple(faults)


class Engine(abc.ABC):
    """Runs jobs ahead of their use."""

    @abc.abstractmethod
    def run(self, jobs: Iterator[Job]) -> Iterator[tuple[PictureBatch, tuple[Fault, ...]]]:
        """The batches of the jobs, in order; jobs are drawn from the iterator ahead of their results."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends worker processes and threads."""


class Loader:
    """Batches of one split's pictures on one rank; see the module's beginning.

    Args:
        records: the split.
        config: how to load.
        batch_size: records a step on this rank.
        seed: seed of order and windows.
        rank: this process.
        world_size: number of processes; together they see every record once an epoch.
        report: rejected.jsonl, to which unusable pictures are appended; None reports nothing but counts.
        training: whether `load` gives the training's windows, or the evaluation's.
    """

    def __init__(
        self,
        records: Records,
        config: LoaderConfig,
        engine: Engine,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        report: RejectionLog | None,
        training: bool,
    ) -> None:
        self.records = records
        self.rejected: dict[int, Rejection] = {}
        self._config = config
        self._engine = engine
        self._order = Order(len(records), batch_size, seed, rank, world_size)
        self._report = report or RejectionLog(None)
        self._training = training
        self._next = -1
        self._running: Iterator[tuple[PictureBatch, tuple[Fault, ...]]] = iter(())

    def load(self, step: int) -> PictureBatch:
        """The batch of a training step.

        Raises OptimaError if too many pictures were unusable so far, or all of this batch.
        """
        if step != self._next:
            self._running = self._engine.run(self._jobs_from(step))
        self._next = step + 1
        return self._accept(*next(self._running))

    def once(self, batch_size: int | None = None) -> Iterator[PictureBatch]:
        """Every record of this rank once, in order, with the evaluation's windows; the last batch may be smaller.

        Batches that lose all their pictures are passed over.
        """
        self._next = -1
        order = self._order
        places = order_once(order.records, batch_size or order.batch_size, order.rank, order.world_size)
        for batch, faults in self._engine.run(Job(found, training=False) for found in places):
            accepted = self._accept(batch, faults, may_be_empty=True)
            if len(accepted.indices):
                yield accepted

    def close(self) -> None:
        """Ends worker processes and threads; `load` starts them again."""
        self._running, self._next = iter(()), -1
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _jobs_from(self, step: int) -> Iterator[Job]:
        while True:
            yield Job(self._order.step(step), self._training)
            step += 1

    def _accept(self, batch: PictureBatch, faults: Sequence[Fault], may_be_empty: bool = False) -> PictureBatch:
        for fault in faults:
            if fault.record not in self.rejected:
                rejection = Rejection(self.records[fault.record].id, fault.where, fault.kind, fault.reason)
                self.rejected[fault.record] = rejection
                self._report.add([rejection])
        lost, total = len(self.rejected), len(self.records)
        if lost > self._config.max_rejected * total or (not may_be_empty and not len(batch.indices)):
            last = list(self.rejected.values())[-1]
            raise OptimaError(
                f"{lost} of {total} records of {self.records.name} {self.records.split} have unusable pictures, more "
                f"than the share of {self._config.max_rejected:g} that is allowed, or a whole batch; the last: "
                f"{last.where}: {last.reason}; find them with `python -m optima.run prepare`, or raise max_rejected"
            )
        return batch


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def make_loader(
    records: Records,
    config: LoaderConfig,
    *,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    report: RejectionLog | None = None,
    training: bool = True,
) -> Loader:
    """A loader with the engine that the configuration and the device ask for.

    Args:
        records: the split.
        config: how to load.
        batch_size: records a step on this rank.
        seed: seed of order and windows.
        rank: this process.
        world_size: number of processes.
        device: where the batches' images are wanted; the torch engine gives them on the CPU (pinned for a GPU).
        report: rejected.jsonl, to which unusable pictures are appended.
        training: whether `load` crops at random and mirrors.

    Raises:
        OptimaError: if DALI is asked for and missing, or the records' pictures do not fit one loader.
    """
    if not len(records):
        raise OptimaError(f"{records.name} {records.split} has no records to load")
    device = device or torch.device("cpu")
    pictures = Pictures(records, config.transform, seed)
    engine: Engine
    if config.engine == "dali" or (config.engine == "auto" and device.type == "cuda" and _has_dali()):
        from optima.data.dali_engine import DaliEngine

        engine = DaliEngine(pictures, config, device)
    else:
        from optima.data.torch_engine import TorchEngine

        engine = TorchEngine(pictures, config, pin=device.type == "cuda")
    return Loader(
        records,
        config,
        engine,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        report=report,
        training=training,
    )
