"""Which rank holds up the others? A rank that waits for one that never comes can say that it waits, but not for whom.

So every rank counts the steps of its way, and a thread beside it looks whether the count still grows. Where it does
not, the rank leaves its count with the store of torchrun, where all meet; those that left a smaller count than the
others, or none at all, are the ones that are waited for. This is the same for gloo and NCCL, whose own time limits end
a process without saying which one it waited for; nothing is sent as long as all goes well.
"""

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from optima_core.parallel import Ranks
from optima_core.processes import leave, speaks
from optima_core.step import Batch

_TICKS = 20
"""Looks at the count within the time that it may stand still."""


class StallWatch:
    """While entered, a run of several ranks that makes no progress ends, and says which rank holds up the others.

    Args:
        ranks: The processes of the run; each makes and enters a watch of its own, all at the same time.
        patience: Seconds without progress, more than the longest step, checkpoint and evaluation take.
    """

    def __init__(self, ranks: Ranks, patience: float) -> None:
        self.ranks = ranks
        self.patience = patience
        self._count = 0
        self._place = "begins"
        self._name = ranks.broadcast(secrets.token_hex(8))
        self._thread = self._own = threading.get_ident()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="stalls", daemon=True)

    def at(self, place: str) -> None:
        """Notes progress: what this rank does from now on. All ranks do the same in the same order."""
        self._note(place, self._own)

    def loading(self, load: Callable[[int], Batch], accumulate: int) -> Callable[[int], Batch]:
        """`load` of a `Distiller`, which may be called in any thread, with progress noted before and after a batch."""

        def watched(number: int) -> Batch:
            step = number // accumulate + 1
            self._note(f"loads a batch of step {step}", threading.get_ident())
            batch = load(number)
            self._note(f"learns in step {step}", self._own)
            return batch

        return watched

    def _note(self, place: str, thread: int) -> None:
        self._place, self._thread = place, thread
        self._count += 1

    def __enter__(self) -> Self:
        if self.ranks.count > 1:
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        """Counts its own looks and not the time: a process that was stopped for a while has not stood still."""
        seen, looks = self._count, 0
        while not self._over.wait(self.patience / _TICKS):
            seen, looks = self._count, looks + 1 if seen == self._count else 0
            if looks >= _TICKS:
                self._end()

    def _end(self) -> None:
        """Says what all ranks are at, and ends this one; torchrun then ends the others."""
        own = f"{self._count} {self._place}, at {_line_of(self._thread)}"
        reports = {self.ranks.rank: own}
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
            )
            names = [f"optima/stall/{self._name}/{rank}" for rank in range(self.ranks.count)]
            store.set(names[self.ranks.rank], own)
            # Those that wait began to do so later than the one that they wait for, by a step or less.
            time.sleep(self.patience / 4)
            reports |= {rank: store.get(name).decode() for rank, name in enumerate(names) if store.check([name])}
        except RuntimeError:  # the store has gone with the process that held it
            pass
        if speaks():
            print(f"optima: no progress for {self.patience:g} s: {who_holds_up(reports, self.ranks.count)}", flush=True,
                  file=sys.stderr)  # fmt: skip
        leave(2)


def who_holds_up(reports: dict[int, str], ranks: int) -> str:
    """A line that names the ranks which the others wait for.

    Args:
        reports: By rank, how far it has come, as a number, and where it is, as a text, with a blank between.
        ranks: How many there are; those without a report are stopped, or gone.
    """
    counts = {rank: int(report.partition(" ")[0]) for rank, report in reports.items()}
    places = {rank: report.partition(" ")[2] for rank, report in reports.items()}
    silent = [rank for rank in range(ranks) if rank not in reports]
    behind = [rank for rank, count in sorted(counts.items()) if count < max(counts.values())]
    awaited = silent or behind
    waiting = {rank: place for rank, place in sorted(places.items()) if rank not in awaited}
    words = [f"rank {rank} does not answer" if rank in silent else f"rank {rank} {places[rank]}" for rank in awaited]
    others = [f"rank {rank} {place}" for rank, place in waiting.items()]
    if not awaited:
        return f"no rank is behind the others: {'; '.join(others)}"
    return f"{'; '.join(words)}; it is waited for: {'; '.join(others)}"


def _line_of(thread: int) -> str:
    """The line that a thread is at."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its end"
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
