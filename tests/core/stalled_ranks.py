"""Two ranks, of which the second never comes to where the first waits for it; then two that are slow alone.

Prints, as JSON, the exit statuses of all four.
"""

import json
import time

import torch
import torch.distributed as dist
from forked_ranks import fork

from optima_core.parallel import Ranks
from optima_core.stalls import StallWatch


def hang(ranks: Ranks) -> None:
    def load(number: int) -> int:
        if not ranks.first:
            time.sleep(300)
        return number

    with StallWatch(ranks, 4.0) as watch:
        assert watch.loading(load, 3)(33) == 33
        dist.all_reduce(torch.zeros(1))


def take_time(ranks: Ranks) -> None:
    with StallWatch(ranks, 4.0) as watch:
        for step in range(6):
            watch.at(f"learns in step {step}")
            time.sleep(1)


if __name__ == "__main__":
    print(json.dumps([*fork(2, hang), *fork(2, take_time)]))
