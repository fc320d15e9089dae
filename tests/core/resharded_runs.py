"""Runs of four ranks, and what one, two and three make of their checkpoints: DIRECTORY."""

import sys
from dataclasses import replace
from pathlib import Path

from forked_ranks import fork
from padded_models import ROUNDS, distil

from optima_core.parallel import Ranks
from optima_core.processes import Strategy

STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp")


def main(directory: Path) -> None:
    """Half a run of four ranks for each strategy; then, of fewer, what they restored, and came to at the end."""

    def begin(joined: Ranks) -> None:
        for strategy in STRATEGIES:
            distil(replace(joined, strategy=strategy), ROUNDS // 2, "kl", directory / f"4-{strategy}")

    def go_on(joined: Ranks) -> None:
        for strategy in STRATEGIES if joined.count > 1 else STRATEGIES[:1]:
            ranks = replace(joined, strategy=strategy)
            for written in STRATEGIES:
                place, start = f"{joined.count}-{strategy}-from-{written}", directory / f"4-{written}"
                distil(ranks, ROUNDS // 2, "kl", directory / "restored" / place, start)
                distil(ranks, ROUNDS, "kl", directory / "ended" / place, start)

    for count, work in ((4, begin), (1, go_on), (2, go_on), (3, go_on)):
        if any(fork(count, work)):
            raise SystemExit(f"a rank of {count} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
