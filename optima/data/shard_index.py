"""Where the samples of large or remote shards lie, kept on disk: no start and no step depends on how many there are.

A shard is read once, from its beginning to its end, and what its records are is written into a file of its own:

    HEADER      what the file is, how many records and rejections there are, and of which tar
    ENTRIES     a record each: where its row ends, its CRC-32, its place in the order of the split
    ROWS        a record each, JSON: id, images (offset, bytes, CRC-32 where it is known), texts, target, answers
    REJECTED    JSON lines

A start reads the headers, a record costs two short reads, and nothing of it stays in memory. The file's name is a
digest of the shard's address and of how it was read; a shard whose size or date has changed is read again.
"""

import hashlib
import json
import os
import struct
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from optima.data.find_shards import Tar
from optima.data.record import Collector, ImageSource, Record, Rejection
from optima.data.remote import is_address
from optima_core.errors import OptimaError

_MAGIC = b"optima\x00\x01"
_HEADER = struct.Struct("<8sQQQQQQI")  # magic; records, rejections; bytes of rows; size and stamp of the tar; CRC-32s
_ENTRY = np.dtype([("end", "<u8"), ("place", "<i8"), ("crc", "<u4")])
_THREADS = 8  # shards that are read at a time
_OPEN = 64  # files that are open at a time


class Facts(NamedTuple):
    """What a header says. size, stamp: of the tar, as `Tar` has them. rejections_crc: CRC-32 of the last part."""

    records: int
    rejections: int
    rows: int
    size: int
    stamp: int
    rejections_crc: int


class IndexedShard(NamedTuple):
    """A shard that was read. path: of its index. tar: its address. prefix: what the ids of its records begin with."""

    path: str
    tar: str
    prefix: str
    facts: Facts


class Found(NamedTuple):
    """What one shard of `size` bytes holds. places: of each record in the split's order, where it has one."""

    collector: Collector
    places: list[int]
    size: int


class IndexedRecords(Sequence[Record]):
    """The records of shards, read from their indices when they are asked for.

    Args:
        shards: the shards.
        order: the records' numbers, counted through all shards, in the split's order; None takes them as they lie.
    """

    def __init__(self, shards: Sequence[IndexedShard], order: NDArray[np.int64] | None = None) -> None:
        self._shards = list(shards)
        self._order = order
        self._starts = np.cumsum([0, *(shard.facts.records for shard in shards)])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Records of each shard, in the order in which they are counted."""
        return np.diff(self._starts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = index % len(self)
        if self._order is not None:
            number = int(self._order[number])
        place = int(np.searchsorted(self._starts, number, "right")) - 1
        shard = self._shards[place]
        name, images, texts, target, answers = _index(shard.path, shard.facts).row(number - int(self._starts[place]))
        sources = tuple(ImageSource(shard.tar, offset, size, checksum) for offset, size, checksum in images)
        return Record(shard.prefix + name, sources, tuple(texts), target, tuple(answers))


def keep_index(
    tars: Sequence[Tar], folder: Path | None, reader: str, read: Callable[[Tar], Found], prefix: Callable[[Tar], str]
) -> list[IndexedShard]:
    """The shards with their indices; those that have none, or one of another content, are read.

    Several processes may do this at a time: each begins elsewhere, and takes what the others have written.

    Args:
        tars: the shards.
        folder: where indices are kept; None takes the user's cache.
        reader: what `read` does, in a word that changes when it does.
        read: reads a shard.
        prefix: what the ids of a shard's records begin with.

    Raises:
        OptimaError: if a shard at an address cannot be read, or an index cannot be written.
    """
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "optima" / "shards"
    paths = [index_path(folder, tar, reader) for tar in tars]
    facts = {number: known for number in range(len(tars)) if (known := _facts(paths[number], tars[number])) is not None}
    missing = [number for number in range(len(tars)) if number not in facts]

    def index(number: int) -> Facts:
        tar, path = tars[number], paths[number]
        return _facts(path, tar) or _write(path, tar, read(tar), prefix(tar))

    if missing:
        _say(f"reading {len(missing)} of {len(tars)} shards once, for their index in {folder}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptimaError(
                f"cannot make {folder} for the index of shards: {error.strerror}; give --data.index"
            ) from None
        first = len(missing) * int(os.environ.get("RANK", 0)) // max(1, int(os.environ.get("WORLD_SIZE", 1)))
        turned = missing[first:] + missing[:first]
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for done, (number, known) in enumerate(zip(turned, pool.map(index, turned), strict=True), 1):
                    facts[number] = known
                    if done * 10 // len(turned) > (done - 1) * 10 // len(turned) and len(turned) >= 10:
                        _say(f"read {done} of {len(turned)} shards")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [
        IndexedShard(str(path), tar.address, prefix(tar), facts[number])
        for number, (tar, path) in enumerate(zip(tars, paths, strict=True))
    ]


def index_path(folder: Path, tar: Tar, reader: str) -> Path:
    """Where the index of a shard is kept."""
    address = tar.address if is_address(tar.address) else os.path.abspath(tar.address)
    return folder / f"{hashlib.blake2b(json.dumps([reader, address]).encode(), digest_size=16).hexdigest()}.index"


def rejections(shards: Sequence[IndexedShard]) -> tuple[Rejection, ...]:
    """What could not be used of the shards."""
    lossy = [shard for shard in shards if shard.facts.rejections]
    return tuple(found for shard in lossy for found in _index(shard.path, shard.facts).rejections())


def places(shards: Sequence[IndexedShard]) -> NDArray[np.int64]:
    """The place of each record in the split's order."""
    return np.concatenate([_index(shard.path, shard.facts).places() for shard in shards])


class _Index:
    """An index that is open. Raises OptimaError if it is damaged, or was made anew since the start."""

    def __init__(self, path: str, facts: Facts) -> None:
        self.path = path
        self.facts = facts
        self._file = -1
        try:
            self._file = os.open(path, os.O_RDONLY)
            now = _header(os.pread(self._file, _HEADER.size, 0))
        except (OSError, ValueError) as error:
            raise self._damaged() from error
        if now != facts:
            raise OptimaError(f"the index {path} was made anew, of another content of its shard; start again")
        self._rows = _HEADER.size + self.facts.records * _ENTRY.itemsize

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def row(self, number: int) -> list[Any]:
        """The fields of a record."""
        first = max(0, number - 1)
        place = _HEADER.size + first * _ENTRY.itemsize
        entries = np.frombuffer(self._read((number + 1 - first) * _ENTRY.itemsize, place), _ENTRY)
        start, end = int(entries["end"][0]) if number else 0, int(entries["end"][-1])
        if not start <= end <= self.facts.rows:
            raise self._damaged()
        content = self._read(end - start, self._rows + start)
        if zlib.crc32(content) != entries["crc"][-1]:
            raise self._damaged()
        row: list[Any] = json.loads(content)
        return row

    def places(self) -> NDArray[np.int64]:
        """The place of each record."""
        entries = np.frombuffer(self._read(self._rows - _HEADER.size, _HEADER.size), _ENTRY)
        return entries["place"].astype(np.int64)

    def rejections(self) -> Iterator[Rejection]:
        """What could not be used."""
        start = self._rows + self.facts.rows
        content = self._read(os.fstat(self._file).st_size - start, start)
        if zlib.crc32(content) != self.facts.rejections_crc:
            raise self._damaged()
        for line in content.splitlines():
            yield Rejection(**json.loads(line))

    def _read(self, size: int, place: int) -> bytes:
        content = os.pread(self._file, size, place)
        if len(content) != size:
            raise self._damaged()
        return content

    def _damaged(self) -> OptimaError:
        return OptimaError(f"the index {self.path} is damaged; delete it, and it is made again")


@lru_cache(maxsize=_OPEN)
def _index(path: str, facts: Facts) -> _Index:
    return _Index(path, facts)


def _facts(path: Path, tar: Tar) -> Facts | None:
    """What the header of an index says; None if there is none that is whole and of this tar."""
    try:
        with open(path, "rb") as file:
            facts = _header(file.read(_HEADER.size))
            whole = os.fstat(file.fileno()).st_size >= _HEADER.size + facts.records * _ENTRY.itemsize + facts.rows
    except (OSError, ValueError):
        return None
    same = tar.size in (-1, facts.size) and (0 in (tar.stamp, facts.stamp) or tar.stamp == facts.stamp)
    return facts if whole and same else None


def _header(data: bytes) -> Facts:
    """Raises ValueError if it is none."""
    if len(data) != _HEADER.size or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("no header")
    magic, *numbers, _ = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise ValueError("another format")
    return Facts(*numbers)


def _write(path: Path, tar: Tar, found: Found, prefix: str) -> Facts:
    """Writes the index of a shard under a name that is its own only when it is whole."""
    collector = found.collector
    rows = [
        json.dumps(
            [
                record.id.removeprefix(prefix),
                [(source.offset, source.size, source.checksum) for source in record.images],
                record.texts,
                record.target,
                record.answers,
            ]
        ).encode()
        for record in collector.items
    ]
    entries = np.zeros(len(rows), _ENTRY)
    entries["end"] = np.cumsum([len(row) for row in rows])
    entries["place"] = found.places
    entries["crc"] = [zlib.crc32(row) for row in rows]
    rejected = "".join(rejection.line() for rejection in collector.rejected).encode()
    size = int(entries["end"][-1]) if rows else 0
    facts = Facts(len(rows), len(collector.rejected), size, found.size, tar.stamp, zlib.crc32(rejected))
    header = _HEADER.pack(_MAGIC, *facts, 0)[:-4]
    aside = path.with_suffix(f".{uuid.uuid4().hex}.part")  # several processes may write the same one
    try:
        with open(aside, "wb") as file:
            file.write(header + zlib.crc32(header).to_bytes(4, "little") + entries.tobytes())
            file.writelines(rows)
            file.write(rejected)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OptimaError(
            f"cannot write {path}, the index of {tar.name}: {error.strerror}; give --data.index"
        ) from error
    return facts


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
