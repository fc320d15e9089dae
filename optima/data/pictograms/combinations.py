"""Which combinations of things each split may show.

The combination of a scene is (kind, count) when it has one group, and the unordered pair of kinds when it has two. A
stable hash gives one combination in ten to `validation`, one in ten to `test`, and the rest to `train`, so that a
model is always examined on combinations it has never seen.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal, get_args

from optima.data.draws import Draws
from optima.data.pictograms.kinds import KINDS
from optima.data.pictograms.scene import Axis, Content, Group

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

MOST = 4
"""Most objects in a scene."""
COVERED = 0.35
"""Share of scenes with a cover, where nothing else decides it."""
SINGLE = 0.4
"""Share of scenes with one group, where nothing else decides it."""

_COUNT_WEIGHTS = (0.1, 0.2, 0.3, 0.4)
_PAIR_COUNTS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
_PAIR_WEIGHTS = (0.15, 0.15, 0.15, 0.15, 0.2, 0.2)
"""Large counts are drawn more often alone, because groups side by side can only have small ones."""
_SALT = "pictograms 1321"
"""Part of the hash; chosen so that in each split every kind stands beside another and every count occurs alone."""


def split_of(*words: str | int) -> Split:
    """The split a combination belongs to: `split_of("dog", 3)` or `split_of("cat", "dog")`, nouns in order of KINDS."""
    digest = hashlib.sha256("/".join((_SALT, *map(str, words))).encode()).digest()
    tenth = int.from_bytes(digest[:8], "big") % 10
    return "validation" if tenth == 0 else "test" if tenth == 1 else "train"


@dataclass(frozen=True)
class Stock:
    """The combinations of one split, indexed for drawing contents that must satisfy something."""

    singles: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int], ...]
    kinds_alone: tuple[tuple[int, ...], ...]
    """[count] -> kinds that stand alone with that count (index 0 is empty)."""
    counts_alone: tuple[tuple[int, ...], ...]
    """[kind] -> counts with which it stands alone."""
    partners: tuple[tuple[int, ...], ...]
    """[kind] -> kinds it stands beside."""

    def single(self, draws: Draws) -> tuple[Group, ...]:
        """One group, large counts more likely."""
        count = draws.weighted((1, 2, 3, 4), _COUNT_WEIGHTS)
        return (Group(draws.pick(self.kinds_alone[count]), count),)

    def pair(self, draws: Draws) -> tuple[Group, ...]:
        """Two groups in random order."""
        return self.pair_of(*draws.pick(self.pairs), draws)

    def pair_of(self, kind: int, other: int, draws: Draws) -> tuple[Group, ...]:
        """Groups of two given kinds in random order."""
        first, second = draws.weighted(_PAIR_COUNTS, _PAIR_WEIGHTS)
        groups = (Group(kind, first), Group(other, second))
        return groups if draws.chance(0.5) else groups[::-1]

    def pair_with(self, kind: int, draws: Draws, count: int | None = None) -> tuple[Group, ...]:
        """Two groups in random order, one of them of the kind, and with the count if one is given (1 to 3)."""
        other = draws.pick(self.partners[kind])
        if count is None:
            return self.pair_of(kind, other, draws)
        groups = (Group(kind, count), Group(other, draws.between(1, MOST - count)))
        return groups if draws.chance(0.5) else groups[::-1]

    def any(self, draws: Draws) -> tuple[Group, ...]:
        """One or two groups."""
        return self.single(draws) if draws.chance(SINGLE) else self.pair(draws)

    def with_kind(self, kind: int, draws: Draws) -> tuple[Group, ...]:
        """One or two groups, the kind among them."""
        counts = self.counts_alone[kind]
        if counts and draws.chance(SINGLE):
            return (Group(kind, draws.pick(counts)),)
        return self.pair_with(kind, draws)

    def with_count(self, kind: int, count: int, draws: Draws) -> tuple[Group, ...]:
        """One or two groups, exactly `count` objects of the kind among them; `can_show` must hold."""
        alone = count in self.counts_alone[kind]
        if count == MOST or (alone and draws.chance(SINGLE)):
            return (Group(kind, count),)
        return self.pair_with(kind, draws, count)

    def without_kind(self, kind: int, draws: Draws) -> tuple[Group, ...]:
        """One or two groups, the kind not among them."""
        while True:
            groups = self.any(draws)
            if all(group.kind != kind for group in groups):
                return groups

    def can_show(self, kind: int, count: int) -> bool:
        """Whether some scene of the split shows exactly that many of the kind."""
        return count in self.counts_alone[kind] or (count < MOST and bool(self.partners[kind]))


def arrange(groups: tuple[Group, ...], draws: Draws, covered: bool | None = None) -> Content:
    """Adds an axis to two groups, and a cover by chance or as asked."""
    axis: Axis | None = None
    if len(groups) == 2:
        axis = "horizontal" if draws.chance(0.5) else "vertical"
    return Content(groups, axis, draws.chance(COVERED) if covered is None else covered)


@cache
def stock(split: Split) -> Stock:
    """The combinations of the split."""
    numbers = range(len(KINDS))
    singles = [(k, n) for k in numbers for n in range(1, MOST + 1) if split_of(KINDS[k].name, n) == split]
    pairs = [pair for pair in combinations(numbers, 2) if split_of(KINDS[pair[0]].name, KINDS[pair[1]].name) == split]
    return Stock(
        singles=tuple(singles),
        pairs=tuple(pairs),
        kinds_alone=_grouped(((count, kind) for kind, count in singles), MOST + 1),
        counts_alone=_grouped(singles, len(KINDS)),
        partners=_grouped([*pairs, *((second, first) for first, second in pairs)], len(KINDS)),
    )


def _grouped(items: Iterable[tuple[int, int]], length: int) -> tuple[tuple[int, ...], ...]:
    table: list[list[int]] = [[] for _ in range(length)]
    for key, value in items:
        table[key].append(value)
    return tuple(map(tuple, table))
