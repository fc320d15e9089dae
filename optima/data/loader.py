"""Batches of images: `loader.load(step)` for training, `loader.once()` for an evaluation.

    records = open_records("vqav2", root, "train")
    with make_loader(records, LoaderConfig(), batch_size=32, seed=0) as loader:
        batch = loader.load(0)                      # images uint8 [32, 1, 3, S, S], indices, epochs
        texts = [records[i].text_at(e) for i, e in zip(batch.indices.tolist(), batch.epochs.tolist())]

What belongs to step s, which records (`optima.data.order`) and which part of each image (`optima.data.transform`), is
a function of (seed, s, rank): `load` of consecutive steps comes from a pipeline that runs ahead, `load` of any other
step starts that pipeline anew there, and gives what an uninterrupted run would have given. There is no state to save.

Two engines do the work, and choose nothing, so they agree on every record and window, and on pixels up to decoders'
rounding:

- `torch`: torch's DataLoader, libjpeg-turbo through simplejpeg (Pillow where it is missing) and torch's resampling;
- `dali`: NVIDIA DALI, which decodes on the GPU where there is one.

"auto" takes DALI on a GPU if it is installed, else torch: on a CPU torch's engine is the faster one.

An image that cannot be used leaves its batch one record smaller, is written to `rejected.jsonl` and counted; above
`max_rejected` of all records the run ends with an OptimaError. `prepare` finds them before.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import torch

from optima.data.config import LoaderConfig
from optima.data.engine import Engine, Fault, ImageBatch, ImageReader, Job
from optima.data.order import Order
from optima.data.order import once as order_once
from optima.data.record import Records, Rejection, RejectionLog
from optima.data.shard_index import IndexedRecords
from optima.data.torch_engine import TorchEngine
from optima_core.errors import OptimaError


class Loader:
    """Batches of one split's images on one rank; see the module's beginning.

    Args:
        records: the split.
        config: how to load.
        batch_size: records a step on this rank.
        seed: seed of order and windows.
        rank: this process.
        world_size: number of processes; together they see every record once an epoch.
        log: of rejected.jsonl, to which unusable images are appended; None keeps no list.
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
        log: RejectionLog | None,
        training: bool,
    ) -> None:
        self.records = records
        self.rejected: dict[int, Rejection] = {}
        self._config = config
        self._engine = engine
        shards = records.items.sizes if isinstance(records.items, IndexedRecords) else ()
        self._order = Order(len(records), batch_size, seed, rank, world_size, shards)
        self._log = log or RejectionLog(None)
        self._training = training
        self._next = -1
        self._running: Iterator[tuple[ImageBatch, tuple[Fault, ...]]] = iter(())

    def load(self, step: int) -> ImageBatch:
        """The batch of a training step.

        Raises OptimaError if too many images were unusable so far, or all of this batch.
        """
        if step != self._next:
            self._running = self._engine.run(self._jobs_from(step))
        self._next = step + 1
        return self._accept(*next(self._running))

    def once(self, batch_size: int | None = None) -> Iterator[ImageBatch]:
        """Every record of this rank once, in order, with the evaluation's windows; the last batch may be smaller.

        Batches that lose all their images are passed over.
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

    def _accept(self, batch: ImageBatch, faults: Sequence[Fault], may_be_empty: bool = False) -> ImageBatch:
        for fault in faults:
            if fault.record not in self.rejected:
                rejection = Rejection(self.records[fault.record].id, fault.where, fault.kind, fault.reason)
                self.rejected[fault.record] = rejection
                self._log.add([rejection])
        lost, total = len(self.rejected), len(self.records)
        if lost > self._config.max_rejected * total or (not may_be_empty and not len(batch.indices)):
            last = list(self.rejected.values())[-1]
            raise OptimaError(
                f"{lost} of {total} records of {self.records.name} {self.records.split} have unusable images, more "
                f"than the share of {self._config.max_rejected:g} that is allowed, or a whole batch; the last: "
                f"{last.where}: {last.reason}; find them with `optima prepare`, or raise max_rejected"
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
    log: RejectionLog | None = None,
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
        log: of rejected.jsonl, to which unusable images are appended; None keeps no list.
        training: whether `load` crops at random and mirrors.

    Raises:
        OptimaError: if DALI is asked for and missing, or the records' images do not fit one loader.
    """
    if not len(records):
        raise OptimaError(f"{records.name} {records.split} has no records to load")
    device = device or torch.device("cpu")
    reader = ImageReader(records, config.transform, seed)
    engine: Engine
    if config.engine == "dali" or (config.engine == "auto" and device.type == "cuda" and _has_dali()):
        from optima.data.dali_engine import DaliEngine  # an extra, refused in its first lines where it is missing

        engine = DaliEngine(reader, config, device)
    else:
        engine = TorchEngine(reader, config, pin=device.type == "cuda")
    return Loader(
        records,
        config,
        engine,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        log=log,
        training=training,
    )
