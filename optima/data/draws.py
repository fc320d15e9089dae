"""Random choices that are a pure function of a key, cheap enough to be made thousands of times a second."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

BLOCK = 64


class Draws:
    """A stream of random choices from the counter-based Philox generator.

    Two 64-bit integers name the stream; equal names give equal choices in every process and on every machine. Numbers
    are fetched in blocks, because one call into numpy costs as much as fifty Python additions.
    """

    __slots__ = ("_generator", "_units")

    def __init__(self, stream: int, index: int) -> None:
        key = np.array([stream, index], dtype=np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key))
        self._units: list[float] = []

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        if not self._units:
            self._units = self._generator.random(BLOCK).tolist()
        return self._units.pop()

    def below(self, bound: int) -> int:
        """Uniform in 0, ..., bound - 1."""
        return int(self.unit() * bound)

    def between(self, low: int, high: int) -> int:
        """Uniform in low, ..., high, both included."""
        return low + int(self.unit() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.unit() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, each equally likely."""
        return items[int(self.unit() * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of the items, with probability in proportion to its weight."""
        left = self.unit() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]
