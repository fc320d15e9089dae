"""The loader's engine over NVIDIA DALI: decodes and resamples on the GPU where there is one, else on the CPU.

Bytes and windows are chosen by `optima.data.engine`, as for the torch engine, and fed in: DALI's own readers would
shuffle in an order of their own, and resume through a blob, where a step's number is enough. What DALI decodes are
JPEGs of one or three components that lie upright; the few others of a batch are made on the side by
`optima.data.images`, so that both engines agree on them bit for bit.

On a CPU, DALI decodes the windows and torch resamples them, since torch's antialiased kernel takes half the time of
DALI's (bench/suites/loaders.py). On a GPU, DALI does both.

Damage that libjpeg only warns of, such as a hole in the compressed data, goes unnoticed here; `prepare` finds it.
"""

import importlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from optima.data.config import LoaderConfig
from optima.data.engine import Engine, Fault, ImageBatch, ImageReader, Job, Ready, assemble
from optima.data.record import Unusable
from optima.data.torch_engine import load_job
from optima.data.transform import resample
from optima_core.errors import OptimaError

try:
    # By name, since DALI's own type hints lack what it makes when it is imported.
    dali: Any = importlib.import_module("nvidia.dali")
    fn: Any = importlib.import_module("nvidia.dali.fn")
    types: Any = importlib.import_module("nvidia.dali.types")
except ImportError as error:
    raise OptimaError(
        "engine dali needs the package nvidia-dali-cuda130 (or -cuda120), which `pip install nvidia-dali-cuda130` "
        f"brings; engine torch works without it ({error})"
    ) from error

Result = tuple[ImageBatch, tuple[Fault, ...]]

_DEPTH = 2  # batches that DALI works on at a time


@dataclass
class _Batch:
    """A job whose images are read: those for DALI, the squares of the others, and what was lost."""

    job: Job
    ready: list[Ready] = field(default_factory=list)
    squares: list[tuple[int, int, Tensor]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)


class DaliEngine(Engine):
    """Reads ahead in threads, and keeps DALI two batches ahead."""

    def __init__(
        self, reader: ImageReader, config: LoaderConfig, device: torch.device, resample_in_dali: bool | None = None
    ) -> None:
        """resample_in_dali: whether DALI resamples too; by default on a GPU only."""
        self._reader = reader
        self._device = device
        self._gpu = device.type == "cuda"
        self._whole = self._gpu if resample_in_dali is None else resample_in_dali
        self._threads = max(1, config.worker_count())
        self._ahead = _DEPTH + config.prefetch
        self._pool: ThreadPoolExecutor | None = None
        self._pipeline: Any = None
        self._copies: torch.cuda.Stream | None = None

    def run(self, jobs: Iterator[Job]) -> Iterator[Result]:
        """The batches of the jobs; images are on the engine's device."""
        self.close()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="optima-read")
        reading: deque[Future[_Batch]] = deque()
        decoding: deque[_Batch] = deque()
        while True:
            for job in itertools.islice(jobs, self._ahead - len(reading) - len(decoding)):
                reading.append(self._pool.submit(self._read, job))
            try:
                while reading and len(decoding) < _DEPTH:
                    decoding.append(reading.popleft().result())
                    self._begin(decoding[-1])
                if not decoding:
                    return
                results = [self._finish(decoding[0])]
                decoding.popleft()
            except Exception as error:  # DALI raises the type of whatever its operator met
                if "Critical error in pipeline" not in str(error):
                    raise
                # An image that DALI cannot decode ends its whole pipeline: the next batch starts another.
                results = self._rescue(decoding, error)
                decoding.clear()
                self._pipeline = None
            yield from results

    def close(self) -> None:
        """Ends the threads and the pipeline."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._pipeline = None, None

    def _read(self, job: Job) -> _Batch:
        batch = _Batch(job)
        reader = self._reader
        for row, place, side, content in reader.read_all(job):
            if row in batch.lost:
                continue
            try:
                ready = reader.ready(place, row, side, job.training, content)
                if ready.header.turbo and ready.header.orientation == 1:
                    batch.ready.append(ready)
                else:
                    batch.squares.append((row, side, reader.square(ready)))
            except Unusable as fault:
                batch.faults.append(reader.fault(place, side, fault))
                batch.lost.add(row)
        return batch

    def _begin(self, batch: _Batch) -> None:
        """Gives a batch to DALI."""
        if not batch.ready:
            return
        capacity = len(batch.job.places) * self._reader.sides
        if self._pipeline is None:
            self._pipeline = self._build(capacity)
        windows = [ready.window for ready in batch.ready]
        feed = self._pipeline.feed_input
        feed("encoded", [np.frombuffer(ready.data, dtype=np.uint8) for ready in batch.ready])
        feed("start", [np.array([w.top, w.left], dtype=np.int32) for w in windows])
        feed("end", [np.array([w.top + w.height, w.left + w.width], dtype=np.int32) for w in windows])
        if self._whole:
            feed("mirror", [np.array(w.mirrored, dtype=np.int32) for w in windows])
        self._pipeline.schedule_run()

    def _finish(self, batch: _Batch) -> Result:
        """Takes a batch from DALI."""
        config = self._reader.config
        shape = (len(batch.job.places), self._reader.sides, 3, config.image_size, config.image_size)
        output: Any = self._pipeline.share_outputs()[0] if batch.ready else None
        if self._gpu:
            images = self._from_gpu(output, batch, shape)
        else:
            images = torch.empty(shape, dtype=torch.uint8)
            for place, ready in enumerate(batch.ready):
                pixels = np.asarray(output.at(place))
                images[ready.row, ready.side] = (
                    torch.from_numpy(pixels.copy())
                    if self._whole
                    else resample(pixels, config.image_size, config.interpolation, ready.window.mirrored)
                )
        if batch.ready:
            self._pipeline.release_outputs()
        for row, side, square in batch.squares:
            images[row, side] = square.to(self._device)
        return assemble(batch.job.places, images, batch.faults, batch.lost)

    def _from_gpu(self, output: Any, batch: _Batch, shape: tuple[int, ...]) -> Tensor:
        stream = self._stream()
        with torch.cuda.stream(stream):
            images = torch.empty(shape, dtype=torch.uint8, device=self._device)
            if batch.ready:
                rows = torch.tensor([ready.row * self._reader.sides + ready.side for ready in batch.ready])
                squares = from_dlpack(output.as_tensor())
                images.view(-1, *shape[2:]).index_copy_(0, rows.to(self._device), squares)
        stream.synchronize()
        images.record_stream(torch.cuda.current_stream(self._device))
        return images

    def _stream(self) -> torch.cuda.Stream:
        """A stream of the engine's own, so that waiting for the copy does not wait for the training step before it.

        One for all batches: torch's allocator keeps the memory of every stream for that stream.
        """
        if self._copies is None:
            self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return self._copies

    def _rescue(self, batches: Iterable[_Batch], error: Exception) -> list[Result]:
        """The batches made by the torch engine. Raises OptimaError if it finds nothing that DALI can have failed at."""
        results, explained = [], False
        for batch in batches:
            result, faults = load_job(self._reader, batch.job)
            explained |= len(faults) > len(batch.faults)
            results.append((result._replace(images=result.images.to(self._device)), faults))
        if not explained:
            line = " ".join(str(error).split())[:300]
            raise OptimaError(f"DALI failed at images that others can decode: {line}; take engine torch") from error
        return results

    def _build(self, capacity: int) -> Any:
        size = self._reader.config.image_size
        filters = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}

        @dali.pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=capacity,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if self._gpu else None,
            exec_pipelined=False,  # else the first run would want the input of two
            exec_async=True,
            prefetch_queue_depth=_DEPTH,
        )
        def graph() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            end = fn.external_source(name="end", dtype=types.INT32, ndim=1)
            pixels = fn.decoders.image_slice(
                encoded,
                start=start,
                end=end,
                axes=[0, 1],
                device="mixed" if self._gpu else "cpu",
                output_type=types.RGB,
            )
            if not self._whole:
                return pixels
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            squares = fn.resize(
                pixels, size=[size, size], interp_type=filters[self._reader.config.interpolation], antialias=True
            )
            return fn.crop_mirror_normalize(
                squares, dtype=types.UINT8, output_layout="CHW", mirror=mirror, mean=[0.0], std=[1.0]
            )

        pipeline = graph()
        pipeline.build()
        return pipeline
