"""Runs of several ranks, and what other numbers of them make of their checkpoints: DIRECTORY.

Three ranks with FSDP, read by one and two; OPTIMA_TEST_LONG: four with every strategy, read by one, two and three.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from forked_ranks import fork
from padded_models import ROUNDS, distil

from optima_core.parallel import Ranks
from optima_core.processes import Strategy

LONG = bool(os.environ.get("OPTIMA_TEST_LONG"))
WRITERS, READERS = (4, (1, 2, 3)) if LONG else (3, (1, 2))
WRITTEN: tuple[Strategy, ...] = ("ddp", "fsdp", "hsdp") if LONG else ("fsdp",)


def read_with(count: int) -> tuple[Strategy, ...]:
    """The strategies of so many readers."""
    return ("ddp", "fsdp") if count > 1 and LONG else ("fsdp",) if count > 1 else ("ddp",)


def spread(joined: Ranks, strategy: Strategy) -> Ranks:
    """The ranks with another strategy."""
    return replace(joined, strategy=strategy, shard_over=2 if strategy == "hsdp" else 0)


def main(directory: Path) -> None:
    """Half a run for each strategy; then, of fewer ranks, what they restored, and came to at the end."""

    def begin(joined: Ranks) -> None:
        for strategy in WRITTEN:
            distil(spread(joined, strategy), directory / f"written-{strategy}", ROUNDS // 2)

    def go_on(joined: Ranks) -> None:
        for strategy in read_with(joined.count):
            for written in WRITTEN:
                place, start = f"{joined.count}-{strategy}-from-{written}", directory / f"written-{written}"
                ranks = spread(joined, strategy)
                distil(ranks, directory / "restored" / place, ROUNDS // 2, start)
                distil(ranks, directory / "ended" / place, start=start)

    for count, work in ((WRITERS, begin), *((count, go_on) for count in READERS)):
        if any(fork(count, work)):
            raise SystemExit(f"a rank of {count} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
