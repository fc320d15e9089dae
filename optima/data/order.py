"""Which records belong to which step: a pure function of (seed, step, rank).

The training stream is the epochs one after another, each a permutation of all records drawn from (seed, epoch). Step s
takes the next `batch_size * world_size` places of the stream, rank r the r-th `batch_size` of them. So every record
comes exactly once an epoch on any number of ranks, a batch is always full (it may straddle two epochs), and resuming at
step s needs nothing but s.

More than `WHOLE` records that lie in shards are not drawn from all at once, which would take memory and time for each
of them: an epoch shuffles the shards, cuts their row into blocks of about `BLOCK` records, and shuffles each block when
a step first falls into it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WHOLE = 2**20
"""Most records that are shuffled as a whole: 8 MiB of places."""

BLOCK = 2**17
"""Records of a block of shards, of more; a last shard may add to it."""

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
        shards: Records of each shard, in turn, if they lie in shards; together `records` of them.
    """

    records: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shards: Sequence[int] | NDArray[np.int64] = ()
    _cuts: dict[int, tuple[list[NDArray[np.int64]], NDArray[np.int64]]] = field(
        default_factory=dict, init=False, repr=False
    )
    _drawn: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)

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
            if self.records <= WHOLE or len(self.shards) < 2:
                places.append(Place(epoch, int(self._permutation(epoch)[within])))
            else:
                _, starts = self._blocks(epoch)
                block = int(np.searchsorted(starts, within, "right")) - 1
                places.append(Place(epoch, int(self._block(epoch, block)[within - int(starts[block])])))
        return places

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """All records in the order of an epoch."""
        if (epoch, 0) not in self._drawn:
            self._drawn.clear()
            self._drawn[epoch, 0] = self._generator(epoch).permutation(self.records)
        return self._drawn[epoch, 0]

    def _blocks(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The shards of each block of an epoch, and how many records come before it."""
        if epoch not in self._cuts:
            self._cuts.clear()
            sizes = np.asarray(self.shards, dtype=np.int64)
            shuffled = self._generator(epoch).permutation(len(sizes))
            before = np.cumsum(sizes[shuffled]) - sizes[shuffled]
            _, firsts = np.unique(before // BLOCK, return_index=True)
            self._cuts[epoch] = (np.split(shuffled, firsts[1:]), before[firsts])
        return self._cuts[epoch]

    def _block(self, epoch: int, block: int) -> NDArray[np.int64]:
        """The records of a block in the order of an epoch."""
        if (epoch, block) not in self._drawn:
            while len(self._drawn) > 1:  # a batch may straddle two blocks
                self._drawn.pop(next(iter(self._drawn)))
            sizes = np.asarray(self.shards, dtype=np.int64)
            ends = np.cumsum(sizes)
            mine = self._blocks(epoch)[0][block]
            records = np.concatenate([np.arange(ends[shard] - sizes[shard], ends[shard]) for shard in mine])
            self._drawn[epoch, block] = self._generator(epoch, 1 + block).permutation(records)
        return self._drawn[epoch, block]

    def _generator(self, epoch: int, stream: int = 0) -> np.random.Generator:
        """stream: of an epoch, each 2**192 numbers long."""
        key = np.array([self.seed, _PERMUTATIONS + epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(counter=np.array([0, 0, 0, stream], dtype=np.uint64), key=key))


def once(records: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[list[Place]]:
    """Every record once, in order, for an evaluation; the last batch may be smaller.

    Rank r takes records r, r + world_size, and so on.
    """
    mine = range(rank, records, world_size)
    for start in range(0, len(mine), batch_size):
        yield [Place(0, record) for record in mine[start : start + batch_size]]
