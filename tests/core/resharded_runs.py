"""Runs of four ranks, and what one, two and three make of their checkpoints: DIRECTORY."""

import sys
from pathlib import Path

from forked_ranks import fork
from padded_models import ROUNDS, distil, layouts

from optima_core.parallel import Ranks

WRITTEN = ("ddp", "fsdp", "hsdp")
READ = ("ddp", "fsdp")


def main(directory: Path) -> None:
    """Half a run of four ranks for each layout; then, of fewer, what they restored, and came to at the end."""

    def begin(joined: Ranks) -> None:
        for name in WRITTEN:
            distil(layouts(joined)[name], directory / f"4-{name}", ROUNDS // 2)

    def go_on(joined: Ranks) -> None:
        for name in READ if joined.count > 1 else READ[:1]:
            for written in WRITTEN:
                place, start = f"{joined.count}-{name}-from-{written}", directory / f"4-{written}"
                ranks = joined if name == "ddp" else Ranks(joined.rank, joined.count, "fsdp", joined.device)
                distil(ranks, directory / "restored" / place, ROUNDS // 2, start)
                distil(ranks, directory / "ended" / place, start=start)

    for count, work in ((4, begin), (1, go_on), (2, go_on), (3, go_on)):
        if any(fork(count, work)):
            raise SystemExit(f"a rank of {count} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
