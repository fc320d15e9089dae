"""The teacher's forward of the next batch, made while the student learns this one.

On a CPU small layers leave a second core idle: one thread for the teacher and one for the student is faster than both
threads for one after the other. A GPU has its own ways (streams, graphs).
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Literal, NamedTuple

import torch

from optima_core.config import Precision
from optima_core.objective import Forward
from optima_core.precision import arithmetic, attention_kernels
from optima_core.step import Batch, ModelForward
from optima_core.taps import WantedTaps

_CPU = torch.device("cpu")


class _Prepared(NamedTuple, Generic[Batch]):
    batch: Batch
    taught: Forward


class TeacherAhead(Generic[Batch]):
    """Takes the place of the teacher's forward, and answers at once for a batch that `batches` has prepared.

    Args:
        forward: The teacher's. It depends on nothing that training changes, and is in no other thread meanwhile.
        precision: Arithmetic of the forward.
    """

    def __init__(self, forward: ModelForward[Batch], precision: Precision | Literal["fp16"]) -> None:
        self.forward = forward
        self.precision = precision
        self._prepared: _Prepared[Batch] | None = None

    def __call__(self, batch: Batch, wanted: WantedTaps) -> Forward:
        """What the teacher shows of the batch; what was prepared is handed out once."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.batch is batch:
            return prepared.taught
        return self.forward(batch, wanted)

    @contextlib.contextmanager
    def batches(self, batches: Iterator[Batch], wanted: WantedTaps) -> Iterator[Iterator[Batch]]:
        """The same batches; while the caller works on one, a thread fetches the next and shows it to the teacher.

        Caller and thread have half of torch's threads each, rounded down; where torch has one, nothing is made ahead.
        An error of the thread is raised where its batch is asked for. The thread ends with the context.
        """
        threads = torch.get_num_threads()
        if threads == 1:
            yield batches
            return
        half = threads // 2
        # Held for both: torch has one choice of attention kernels a process, and each side would undo the other's.
        with attention_kernels(self.precision, _CPU):
            torch.set_num_threads(half)
            try:
                with ThreadPoolExecutor(1, "optima-teacher", _begin_thread, (half,)) as thread:
                    yield self._through(thread, batches, wanted)
            finally:
                self._prepared = None
                torch.set_num_threads(threads)

    def _through(self, thread: ThreadPoolExecutor, batches: Iterator[Batch], wanted: WantedTaps) -> Iterator[Batch]:
        following = thread.submit(self._prepare, batches, wanted)
        while (prepared := following.result()) is not None:
            following = thread.submit(self._prepare, batches, wanted)
            self._prepared, batch = prepared, prepared.batch
            del prepared  # the taps live as long as the caller needs them
            yield batch

    def _prepare(self, batches: Iterator[Batch], wanted: WantedTaps) -> _Prepared[Batch] | None:
        """The next batch, and what the teacher shows of it; None after the last."""
        for batch in batches:
            with torch.no_grad(), arithmetic(self.precision, _CPU):
                return _Prepared(batch, self.forward(batch, wanted))
        return None


def _begin_thread(threads: int) -> None:
    torch.set_num_threads(threads)
    # Whoever leaves a thread's outermost autocast empties the casts that all threads share, and the student's gradients
    # would be summed in another order. Here one more is open, which nobody leaves.
    torch.autocast("cpu", enabled=False).__enter__()  # type: ignore[no-untyped-call]
