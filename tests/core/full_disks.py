"""Two ranks save, waited for and meanwhile, while the disk of the second is full: DIRECTORY.

Prints, as JSON for each rank, what each save said, and the names of the checkpoints that are there in the end.
"""

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from forked_ranks import fork

from optima_core import CheckpointStore, OptimaError, checkpoint
from optima_core.parallel import Ranks


@contextmanager
def full(place: Any, call: str) -> Iterator[None]:
    """While entered, a call finds no room."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = getattr(place, call)
    setattr(place, call, refuse)
    yield
    setattr(place, call, before)


def save(ranks: Ranks, directory: Path, asynchronous: bool) -> list[str]:
    said: list[str] = []
    store = CheckpointStore(directory, ranks=ranks, asynchronous=asynchronous)
    state = {"weights": torch.ones(50), "moments": torch.ones(50)}
    for step, (place, call) in enumerate(((checkpoint, "write_tensors"), (os, "fsync")), 1):
        with nullcontext() if ranks.first else full(place, call):
            try:
                store.save(step, state)
                store.wait()
            except OptimaError as error:
                said.append(str(error))
        ranks.gather(None)
    store.save(3, state)
    store.wait()
    store.close()
    return [*said, *(path.name for path in sorted(directory.iterdir()))]


def main(directory: Path) -> None:
    def work(ranks: Ranks) -> None:
        found = [save(ranks, directory / str(asynchronous), asynchronous) for asynchronous in (False, True)]
        lines = ranks.gather(json.dumps(found))
        if ranks.first:
            print("\n".join(lines), flush=True)

    if any(fork(2, work)):
        raise SystemExit("a rank failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
