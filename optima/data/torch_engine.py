"""The loader's engine over torch's DataLoader: a worker makes whole batches, and hands them over in shared memory."""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from optima.data.config import LoaderConfig
from optima.data.engine import Engine, Fault, ImageBatch, ImageReader, Job, assemble
from optima.data.record import Unusable

Result = tuple[ImageBatch, tuple[Fault, ...]]


class TorchEngine(Engine):
    """Loads in worker processes, or, without any, in this one."""

    def __init__(self, reader: ImageReader, config: LoaderConfig, pin: bool) -> None:
        """pin: whether batches come in page-locked memory, from which a GPU copies without waiting."""
        self._jobs = _Jobs(reader)
        self._workers = config.worker_count()
        self._prefetch = config.prefetch
        self._pin = pin

    def run(self, jobs: Iterator[Job]) -> Iterator[Result]:
        """The batches of the jobs."""
        loader: DataLoader[Result] = DataLoader(
            self._jobs,
            sampler=jobs,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # for workers' seeds, which nobody needs; training's numbers stay untouched
            pin_memory=self._pin,
        )
        return iter(loader)

    def close(self) -> None:
        """Nothing to do: workers end with the iterator that they feed."""


class _Jobs(Dataset[Result]):
    """Maps a job to its batch."""

    def __init__(self, reader: ImageReader) -> None:
        self._reader = reader

    def __getitem__(self, job: Job) -> Result:
        return load_job(self._reader, job)


def load_job(reader: ImageReader, job: Job) -> Result:
    """The batch of a job, made in this process."""
    size = reader.config.image_size
    images = torch.empty(len(job.places), reader.sides, 3, size, size, dtype=torch.uint8)
    faults: list[Fault] = []
    lost: set[int] = set()
    for row, place, side, content in reader.read_all(job):
        if row in lost:
            continue
        try:
            images[row, side] = reader.square(reader.ready(place, row, side, job.training, content))
        except Unusable as fault:
            faults.append(reader.fault(place, side, fault))
            lost.add(row)
    return assemble(job.places, images, faults, lost)


def _begin_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the training process decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
