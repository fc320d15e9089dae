"""Which records belong to which step: a pure function of (seed, step, rank).

The training stream is the epochs one after another, each a permutation of all records drawn from (seed, epoch). Step s
takes the next `batch_size * world_size` places of the stream, rank r the r-th `batch_size` of them. So every record
comes exactly once an epoch on any number of ranks, a batch is always full (it may straddle two epochs), and resuming at
step s needs nothing but s.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_PERMUTATIONS = 1 << 63  # the half of a seed's keys that permutations are drawn with; windows have the other


class Place(NamedTuple):
    """A place in the stream: which record, and in which epoch it comes."""

    epoch: int
    record: int


@dataclass
class Order:
    """The training stream as one rank sees it.

    Attributes:
        records: Number of records.
        batch_size: Records a step and rank.
        seed: Seed of the permutations.
        rank: This process, 0 to world_size - 1.
        world_size: Number of processes.
    """

    records: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    _drawn: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.records < 1 or self.batch_size < 1:
            raise ValueError(f"records, batch_size must be at least 1, got {self.records}, {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be 0 to {self.world_size - 1}, got {self.rank}")

    def step(self, step: int) -> list[Place]:
        """The places of a step, `batch_size` of them."""
        first = (step * self.world_size + self.rank) * self.batch_size
        places = []
        for position in range(first, first + self.batch_size):
            epoch, within = divmod(position, self.records)
            places.append(Place(epoch, int(self._permutation(epoch)[within])))
        return places

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._drawn:
            self._drawn.clear()
            key = np.array([self.seed, _PERMUTATIONS + epoch], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            self._drawn[epoch] = generator.permutation(self.records)
        return self._drawn[epoch]


def once(records: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[list[Place]]:
    """Every record once, in order, for an evaluation; the last batch may be smaller.

    Rank r takes records r, r + world_size, and so on.
    """
    mine = range(rank, records, world_size)
    for start in range(0, len(mine), batch_size):
        yield [Place(0, record) for record in mine[start : start + batch_size]]
