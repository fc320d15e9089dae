"""Reads tar shards in WebDataset's layout, in a folder or at an address, in place: nothing is unpacked.

Shards that `optima.data.packing` wrote open under the name of the data set that they were packed from; tars of other
origin open as `webdataset`: samples of one image with a caption in `.txt` or `.json`. No tar is trusted: members that
are not plain files, or whose names would leave a folder, are rejected.

Up to 1 GiB of local tars are read at every start, and their records kept in memory. Of more, and of tars at an
address, `optima.data.shard_index` keeps where everything lies, with the checksum of each image at an address. Why not
WebDataset's own pipeline: it streams, so its order depends on workers, ranks and the size of a buffer, and resuming
exactly means to read again all that was read; with an index a batch is a function of its number.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optima.data.find_shards import Tar, find_tars, local_tar
from optima.data.order import WHOLE
from optima.data.record import (
    Collector,
    ImageSource,
    Record,
    Records,
    Unusable,
    clean_text,
    entry,
    identifier,
    safe_name,
)
from optima.data.remote import RemoteFile, fetch_whole, is_address, joined
from optima.data.shard_index import Found, IndexedRecords, keep_index, places, rejections
from optima.data.tar_index import BLOCK, Member, members_of, tar_members
from optima.limits import MAX_IMAGE_BYTES, MAX_LINE_BYTES, MAX_REMOTE_SHARD_BYTES
from optima.task import TASKS, Task
from optima.untrusted import parse_json, read_json, shown
from optima_core.errors import OptimaError

VERSION = 1
SIDES = ("left", "right")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2")

IN_MEMORY = 2**30
"""Bytes of local tars that are read at every start; of more an index is kept."""

READERS = {"webdataset": "webdataset 1", "packed": "packed 1"}
"""What an index was made by; the numbers are raised when the same tar would become other records."""


class _LocalShard:
    """A tar in a folder; only its headers are read, and the texts."""

    def __init__(self, tar: Tar) -> None:
        self.name = tar.name
        self.address = tar.address
        self.length = tar.size

    def members(self) -> Iterator[Member]:
        path = Path(self.address)
        if not path.is_file():
            raise Unusable("shard-broken", f"{self.name} is no plain file")
        yield from tar_members(path)

    def read(self, source: ImageSource) -> bytes:
        return source.read()

    def known(self, source: ImageSource) -> ImageSource:
        return source


class _RemoteShard:
    """A tar at an address, of which all is read once, so that the checksums of its images are known.

    Raises OptimaError if it cannot be read, or has not the size that its list says.
    """

    def __init__(self, tar: Tar) -> None:
        self.name = tar.name
        self.address = tar.address
        self._file = RemoteFile(tar.address)
        self.length = self._file.length
        if self.length > MAX_REMOTE_SHARD_BYTES:
            most = f"{MAX_REMOTE_SHARD_BYTES} are the most at an address"
            raise OptimaError(f"shard {shown(tar.address)} has {self.length} bytes; {most}")
        if tar.size not in (-1, self.length):
            raise OptimaError(
                f"shard {shown(tar.address)} has {self.length} bytes; {tar.size} are wanted: copy it again"
            )

    def members(self) -> Iterator[Member]:
        yield from members_of(self._file, self.length)

    def read(self, source: ImageSource) -> bytes:
        return self._file.at(source.offset, source.size)

    def known(self, source: ImageSource) -> ImageSource:
        return source._replace(checksum=zlib.crc32(self.read(source)))


_Shard = _LocalShard | _RemoteShard


@dataclass
class _Sample:
    """The members of a tar that share a key."""

    key: str
    where: str
    shard: _Shard
    parts: dict[str, ImageSource]


def is_packed(root: str | Path, split: str) -> bool:
    """Whether the folder or address holds packed shards of the split."""
    mark = b'"optima_shards"'
    if is_address(root):
        content = fetch_whole(joined(str(root), f"{split}.json"), "shard list")
        return content is not None and mark in content[:BLOCK]
    path = Path(root) / f"{split}.json"
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return mark in file.read(BLOCK)


def read_packed(root: str | Path, name: str, split: str, index: Path | None = None) -> Records:
    """The records of packed shards, in the order in which they were packed from; above 2**20 as they lie.

    Raises OptimaError if the shards are of another data set or version, or a shard is missing.
    """
    content, tars = _packed_tars(root, name, split)
    placed: dict[str, int] = {}

    def gather(shard: _Shard, collector: Collector, here: dict[str, int]) -> None:
        """Puts the place of each record into `here`, by its id."""

        def make(row: Any, images: tuple[ImageSource, ...]) -> Record:
            name = identifier(entry(row, "id"), "an id")
            texts = tuple(clean_text(text, "a text") for text in _list(row, "texts"))
            answers = tuple(clean_text(answer, "an answer") for answer in _list(row, "answers"))
            target = _whole(row, "target")
            if not -1 <= target < max(1, len(content.classes)):
                raise Unusable("row-type", f"target must be one of {len(content.classes)} classes, got {target!r:.80}")
            place = _whole(row, "place")
            if not 0 <= place < 2**63:
                raise Unusable("row-type", f"place must be that of a record, got {place!r:.80}")
            here.setdefault(name, place)
            return Record(name, images, texts, target, answers)

        for sample in _samples(shard, collector):
            try:
                rows = _json(sample)
                images = _images(sample)
            except Unusable as fault:
                collector.reject(sample.where, fault, sample.key)
                continue
            for row in rows if isinstance(rows, list) else [rows]:
                collector.take(sample.where, sample.key, make, row, images)

    if _fit_memory(tars):
        collector = Collector()
        for tar in tars:
            gather(_shard(tar), collector, placed)
        collector.items.sort(key=lambda record: placed[record.id])
        collector.left_out.update(content.left_out)
        return collector.records(name, split, content.task, content.classes)

    def read(tar: Tar) -> Found:
        shard, collector = _shard(tar), Collector()
        here: dict[str, int] = {}
        gather(shard, collector, here)
        return Found(collector, [here[record.id] for record in collector.items], shard.length)

    reader = f"{READERS['packed']} {len(content.classes)}"
    shards = keep_index(tars, index, reader, read, lambda _: "")
    few = sum(shard.facts.records for shard in shards) <= WHOLE
    items = IndexedRecords(shards, np.argsort(places(shards), kind="stable") if few and shards else None)
    return Records(name, split, content.task, items, content.classes, rejections(shards), content.left_out)


def _packed_tars(root: str | Path, name: str, split: str) -> tuple["_Manifest", list[Tar]]:
    """What a split's `.json` says, and its shards. Raises OptimaError."""
    if is_address(root):
        place = joined(str(root), f"{split}.json")
        content = _manifest(parse_json(fetch_whole(place, "shard list") or b"", place), name, place)
        return content, [Tar(joined(str(root), file), file, size) for file, size in content.shards]
    path = Path(root) / f"{split}.json"
    content = _manifest(read_json(path, "shard list"), name, path)
    tars = []
    for file, size in content.shards:
        tar = Path(root) / file
        if not _has_size(tar, size):
            raise OptimaError(f"shard {shown(tar)} is missing or not whole; {size} bytes are wanted: copy it again")
        tars.append(local_tar(str(tar), tar.name))
    return content, tars


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:  # a name longer than the file system takes
        return False


class _Manifest(NamedTuple):
    """What a split's `.json` says of its shards: file name and bytes of each."""

    task: Task
    classes: tuple[str, ...]
    left_out: dict[str, int]
    shards: list[tuple[str, int]]


def _manifest(content: Any, name: str, path: str | Path) -> _Manifest:
    """Raises OptimaError for shards of another version or data set, and if anything has not the shape that `pack`
    gives it."""
    version = content.get("optima_shards") if isinstance(content, dict) else None
    if version != VERSION:
        raise OptimaError(f"{path} is of version {version!r:.40}, {VERSION} is wanted; pack it again")
    if content.get("name") != name:
        raise OptimaError(f"{path} holds {content.get('name')!s:.80}, not {name}")
    try:
        task, classes, left_out = (entry(content, field) for field in ("task", "classes", "left_out"))
        if not isinstance(task, str) or task not in TASKS:
            raise Unusable("row-type", f"task must be one of {', '.join(TASKS)}, got {task!r:.80}")
        if not isinstance(classes, list) or not all(isinstance(word, str) for word in classes):
            raise Unusable("row-type", f"classes must be a list of texts, got {classes!r:.80}")
        if not isinstance(left_out, dict) or not all(isinstance(count, int) for count in left_out.values()):
            raise Unusable("row-type", f"left_out must be an object of numbers, got {left_out!r:.80}")
        shards = [(safe_name(entry(row, "file")), _whole(row, "bytes")) for row in _list(content, "shards")]
    except Unusable as fault:
        raise OptimaError(f"{path} is no list of shards ({fault.reason}); pack it again") from fault
    return _Manifest(task, tuple(classes), left_out, shards)


def read_webdataset(root: str | Path, split: str, index: Path | None = None) -> Records:
    """Captioned images from tars of any origin: those of the split, or of a pattern, as `find_tars` says."""
    tars = find_tars(root, split)

    def gather(shard: _Shard, stem: str, collector: Collector) -> None:
        for sample in _samples(shard, collector):
            collector.take(sample.where, sample.key, _captioned, stem, sample)

    if _fit_memory(tars):
        collector = Collector()
        for tar in tars:
            gather(_shard(tar), tar.stem, collector)
        return collector.records("webdataset", split, "captioning")

    def read(tar: Tar) -> Found:
        shard, collector = _shard(tar), Collector()
        gather(shard, tar.stem, collector)
        return Found(collector, [0] * len(collector.items), shard.length)

    shards = keep_index(tars, index, READERS["webdataset"], read, lambda tar: f"{tar.stem}/")
    return Records("webdataset", split, "captioning", IndexedRecords(shards), (), rejections(shards))


def _fit_memory(tars: Sequence[Tar]) -> bool:
    return not any(is_address(tar.address) for tar in tars) and sum(tar.size for tar in tars) <= IN_MEMORY


def _shard(tar: Tar) -> _Shard:
    return _RemoteShard(tar) if is_address(tar.address) else _LocalShard(tar)


def _captioned(shard: str, sample: _Sample) -> Record:
    images = _images(sample)
    if len(images) != 1:
        raise Unusable("image-several", f"a sample has one image, got {', '.join(sorted(sample.parts))}")
    if "txt" in sample.parts:
        caption: Any = _words(sample, "txt").decode("utf-8-sig", "surrogateescape")
    else:
        row = _json(sample)
        caption = next((row[field] for field in ("caption", "text") if isinstance(row, dict) and field in row), None)
    return Record(f"{shard}/{sample.key}", images, (clean_text(caption, "a caption"),))


def _samples(shard: _Shard, collector: Collector) -> Iterator[_Sample]:
    """The samples of a tar; members that cannot be trusted, and an end that is missing, are rejected."""
    sample: _Sample | None = None
    for name, source in _members(shard, collector):
        folder, _, leaf = name.rpartition("/")
        stem, _, ending = leaf.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = _Sample(key, f"{shard.name}/{key}", shard, {})
        if ending.lower() in sample.parts:
            collector.reject(f"{shard.name}/{name}", Unusable("duplicate-member", f"a second {name}"), key)
        else:
            sample.parts[ending.lower()] = source
    if sample is not None:
        yield sample


def _members(shard: _Shard, collector: Collector) -> Iterator[tuple[str, ImageSource]]:
    """The plain files of a tar that can be trusted; a tar that breaks off loses what comes after, and no more."""
    try:
        for member in shard.members():
            try:
                name = safe_name(member.name)
                if member.kind == "folder":
                    continue
                if member.kind != "file":
                    raise Unusable("member-type", f"{shown(name)} is no plain file")
                if member.size > MAX_IMAGE_BYTES:
                    size = f"{member.size} bytes; {MAX_IMAGE_BYTES} are the most"
                    raise Unusable("image-bomb", f"{shown(name)} has {size}")
            except Unusable as fault:
                collector.reject(f"{shard.name}/{shown(member.name)}", fault)
            else:
                yield name, ImageSource(shard.address, member.offset, member.size)
    except Unusable as fault:
        collector.reject(shard.name, fault)
    except OSError as error:
        collector.reject(shard.name, Unusable("shard-broken", f"the tar cannot be read: {error.strerror or error}"))


def _images(sample: _Sample) -> tuple[ImageSource, ...]:
    """One image, or the left and the right one. Raises Unusable."""
    found: dict[str, ImageSource] = {}
    for ending, source in sample.parts.items():
        side, _, kind = ending.rpartition(".")
        if kind in IMAGES:
            if side in found:
                raise Unusable("image-several", f"several images: {', '.join(sorted(sample.parts))}")
            found[side] = source
    if set(found) == set(SIDES):
        return tuple(sample.shard.known(found[side]) for side in SIDES)
    if len(found) != 1:
        raise Unusable("image-missing", f"no image among {', '.join(sorted(sample.parts)) or 'nothing'}")
    return tuple(sample.shard.known(source) for source in found.values())


def _list(row: Any, name: str) -> list[Any]:
    found = entry(row, name)
    if not isinstance(found, list):
        raise Unusable("row-type", f"{name} must be a list, got {found!r:.80}")
    return found


def _whole(row: Any, name: str) -> int:
    found = entry(row, name)
    if isinstance(found, bool) or not isinstance(found, int):
        raise Unusable("row-type", f"{name} must be a whole number, got {found!r:.80}")
    return found


def _words(sample: _Sample, ending: str) -> bytes:
    """A member that holds text. Raises Unusable if it is longer than any line of captions may be."""
    part = sample.parts[ending]
    if part.size > MAX_LINE_BYTES:
        raise Unusable("row-overlong", f"the .{ending} has {part.size} bytes; {MAX_LINE_BYTES} are the most")
    return sample.shard.read(part)


def _json(sample: _Sample) -> Any:
    if "json" not in sample.parts:
        raise Unusable("text-missing", f"no .json or .txt among {', '.join(sorted(sample.parts)) or 'nothing'}")
    try:
        return json.loads(_words(sample, "json").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unusable("row-broken", f"the .json is none: {error}") from error
