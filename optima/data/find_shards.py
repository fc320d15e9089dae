"""Where the tars of a split are: in a folder or at an address, by the split's name or by a pattern.

A pattern is a name that ends in `.tar`, or that has `{000..099}`, `{a,b}`, `*` or `?` in it; it counts from the data
root on, unless it is an address itself.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from optima.data.remote import MAGIC, found, is_address, joined
from optima.limits import MAX_SHARDS
from optima.untrusted import shown
from optima_core.errors import OptimaError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


class Tar(NamedTuple):
    """A shard.

    address: path, or address. name: below the data root, as messages call it. size: bytes, -1 if nobody said. stamp: a
    number that changes with the content, 0 if there is none.
    """

    address: str
    name: str
    size: int = -1
    stamp: int = 0

    @property
    def stem(self) -> str:
        """What the ids of its samples begin with."""
        return self.name.removesuffix(".tar")


def local_tar(path: str, name: str) -> Tar:
    """A tar in a folder; of a link to nowhere what reads it will say so."""
    try:
        status = os.stat(path)
    except OSError:
        return Tar(path, name)
    return Tar(path, name, status.st_size, max(0, status.st_mtime_ns))


def is_pattern(split: str) -> bool:
    """Whether this names tars, and no split."""
    return split.endswith(".tar") or re.search(r"[{*?]", split) is not None


def find_tars(root: str | Path, split: str) -> list[Tar]:
    """The tars of a split: ROOT/<split>*.tar, or, for training, all of the root; or those of a pattern.

    Raises OptimaError if there is none, one that was named is missing, or they cannot be listed.
    """
    if is_pattern(split):
        tars = _named(root, expand(split))
    else:
        tars = _matching(root, f"{split}*.tar") or (_matching(root, "*.tar") if split == "train" else [])
    if not tars:
        wanted = split if is_pattern(split) else f"{split}-*.tar"
        raise OptimaError(f"{shown(root)} lacks the {shown(split)} shards: {shown(wanted)}")
    return tars


def expand(pattern: str) -> list[str]:
    """What the braces of a pattern stand for, in order: `{08..10}` for 08, 09, 10, and `{a,b}` for a, b.

    Raises OptimaError if a range of numbers has no end, or there are too many.
    """
    names = [pattern]
    while _BRACES.search(names[0]):
        wider: list[str] = []
        for name in names:
            before, inner, after = _BRACES.split(name, maxsplit=1)
            wider += [f"{before}{choice}{after}" for choice in _choices(inner, pattern)]
            if len(wider) > MAX_SHARDS:
                raise OptimaError(f"{shown(pattern)} stands for more than {MAX_SHARDS} shards, which are the most")
        names = wider
    return names


def _choices(inner: str, pattern: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(inner)
    if numbers is None:
        if "," not in inner:
            raise OptimaError(f"{shown(pattern)}: braces hold a range such as 000..099, or names, got {inner!r:.40}")
        yield from inner.split(",")
        return
    first, last = int(numbers[1]), int(numbers[2])
    if not first <= last < first + MAX_SHARDS:
        raise OptimaError(f"{shown(pattern)}: a range goes up, by at most {MAX_SHARDS} shards, got {inner!r:.40}")
    yield from (f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1))


def _named(root: str | Path, names: Sequence[str]) -> list[Tar]:
    tars: dict[str, Tar] = {}
    for name in names:
        if is_address(root) or is_address(name):
            address = name if is_address(name) else joined(str(root), name)
            new = _listed(root, address) if MAGIC.search(name) else [Tar(address, _below(root, address))]
        else:
            new = _local(root, name)
            if not new and not MAGIC.search(name):
                raise OptimaError(f"there is no shard {shown(os.path.join(root, name))}")
        tars |= {tar.address: tar for tar in new}
    return list(tars.values())


def _matching(root: str | Path, pattern: str) -> list[Tar]:
    return _listed(root, joined(str(root), pattern)) if is_address(root) else _local(root, pattern)


def _listed(root: str | Path, pattern: str) -> list[Tar]:
    return [Tar(address, _below(root, address), size, stamp) for address, (size, stamp) in found(pattern).items()]


def _below(root: str | Path, address: str) -> str:
    start = f"{str(root).rstrip('/')}/"
    return address.removeprefix(start) if address.startswith(start) else address.partition("://")[2]


def _local(root: str | Path, pattern: str) -> list[Tar]:
    folder = str(Path(root))
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), pattern), include_hidden=True))
    tars = [local_tar(path, path.removeprefix(folder + os.sep)) for path in paths]
    if len(tars) > MAX_SHARDS:
        raise OptimaError(f"{shown(root)} holds {len(tars)} shards; {MAX_SHARDS} are the most")
    return tars
