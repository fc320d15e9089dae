"""Tar shards in WebDataset's layout: written by `prepare`, read in place, never unpacked.

    OUT/train.json              what was packed: name, task, classes, shards, tokenizer
    OUT/train-000000.tar        000000000.jpg (or .left.jpg and .right.jpg), .json and .tokens of each sample
    OUT/train-000000.idx        where each component lies, for DALI's `fn.readers.webdataset`

A sample is an image, or a pair of them, once, with all its records: `.json` lists them, `.tokens` holds one row of
int32 token ids (little-endian, text_length of them) for each of their texts in turn. A folder with such a `.json` opens
under the name of the data set that it was packed from.

Tars of other origin open as `webdataset`: samples of one image with a caption in `.txt` or `.json`. No tar is
trusted: members that are not plain files, or whose names would leave a folder, are rejected.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from optima.data.images import FORMATS, inspect
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
from optima.data.tar_index import BLOCK, tar_members
from optima.data.tokenizer import Tokenizer
from optima.limits import MAX_IMAGE_BYTES, MAX_LINE_BYTES
from optima.task import TASKS, Task
from optima.untrusted import read_json, shown
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError

VERSION = 1
SIDES = ("left", "right")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2")
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"} | {
    name: name.lower() for name in FORMATS if name not in ("JPEG", "TIFF", "JPEG2000")
}


class Tokens(NamedTuple):
    """How texts are turned into the rows of `.tokens`; longer texts are cut."""

    name: str
    tokenizer: Tokenizer
    length: int


@dataclass
class _Sample:
    """The members of a tar that share a key."""

    key: str
    where: str
    parts: dict[str, ImageSource]


def pack(records: Records, out: Path, shard_bytes: int, tokens: Tokens | None) -> list[Path]:
    """Writes the shards of a split, and last its `.json`, so that a packing that was stopped is not taken for whole.

    Args:
        records: what to pack; its images have been found usable.
        out: folder to write into.
        shard_bytes: a shard is closed when it has reached this size.
        tokens: how to make `.tokens`; None writes none.

    Returns:
        The shards.
    """
    groups: dict[tuple[ImageSource, ...], list[int]] = {}
    for place, record in enumerate(records.items):
        groups.setdefault(record.images, []).append(place)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{records.split}.json").unlink(missing_ok=True)  # of an earlier packing, of which parts will be replaced
    shards: list[dict[str, Any]] = []
    writer: _ShardWriter | None = None
    for number, (sources, places) in enumerate(groups.items()):
        if writer is None:
            writer = _ShardWriter(out / f"{records.split}-{len(shards):06d}.tar")
        writer.add(f"{number:09d}", _components(records, sources, places, tokens))
        if writer.bytes >= shard_bytes:
            shards.append(writer.close())
            writer = None
    if writer is not None:
        shards.append(writer.close())
    content = {
        "optima_shards": VERSION,
        "name": records.name,
        "split": records.split,
        "task": records.task,
        "classes": records.classes,
        "records": len(records),
        "left_out": records.left_out,
        "tokenizer": tokens.name if tokens else None,
        "text_length": tokens.length if tokens else None,
        "shards": shards,
    }
    write_atomically(out / f"{records.split}.json", (json.dumps(content, indent=1) + "\n").encode())
    return [out / shard["file"] for shard in shards]


def is_packed(root: Path, split: str) -> bool:
    """Whether the folder holds packed shards of the split."""
    path = root / f"{split}.json"
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b'"optima_shards"' in file.read(BLOCK)


def read_packed(root: Path, name: str, split: str) -> Records:
    """The records of packed shards, in the order in which they were packed from.

    Raises OptimaError if the shards are of another data set or version, or a shard is missing.
    """
    path = root / f"{split}.json"
    content = _manifest(read_json(path, "shard list"), name, path)
    collector = Collector()
    placed: dict[str, int] = {}

    def make(row: Any, images: tuple[ImageSource, ...]) -> Record:
        name = identifier(entry(row, "id"), "an id")
        texts = tuple(clean_text(text, "a text") for text in _list(row, "texts"))
        answers = tuple(clean_text(answer, "an answer") for answer in _list(row, "answers"))
        target = _whole(row, "target")
        if not -1 <= target < max(1, len(content.classes)):
            raise Unusable("row-type", f"target must be one of {len(content.classes)} classes, got {target!r:.80}")
        record = Record(name, images, texts, target, answers)
        placed.setdefault(name, _whole(row, "place"))
        return record

    for file, size in content.shards:
        tar = root / file
        if not _has_size(tar, size):
            raise OptimaError(f"shard {shown(tar)} is missing or not whole; {size} bytes are wanted: copy it again")
        for sample in _samples(tar, collector):
            try:
                rows = _json(sample)
                images = _images(sample)
            except Unusable as fault:
                collector.reject(sample.where, fault, sample.key)
                continue
            for row in rows if isinstance(rows, list) else [rows]:
                collector.take(sample.where, sample.key, make, row, images)
    collector.items.sort(key=lambda record: placed[record.id])
    collector.left_out.update(content.left_out)
    return collector.records(name, split, content.task, content.classes)


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


def _manifest(content: Any, name: str, path: Path) -> _Manifest:
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


def read_webdataset(root: Path, split: str) -> Records:
    """Captioned images from tars of any origin: ROOT/<split>-*.tar, or, for training, all tars of the folder."""
    tars = sorted(root.glob(f"{split}*.tar"))
    if not tars and split == "train":
        tars = sorted(root.glob("*.tar"))
    if not tars:
        raise OptimaError(f"{shown(root)} lacks the {split} shards: {split}-*.tar")
    collector = Collector()
    for tar in tars:
        for sample in _samples(tar, collector):
            collector.take(sample.where, sample.key, _captioned, tar.stem, sample)
    return collector.records("webdataset", split, "captioning")


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


def _components(
    records: Records, sources: Sequence[ImageSource], places: Sequence[int], tokens: Tokens | None
) -> dict[str, bytes]:
    parts: dict[str, bytes] = {}
    for side, source in zip(SIDES, sources, strict=False):
        data = source.read()
        ending = ENDINGS[inspect(data).format]
        parts[ending if len(sources) == 1 else f"{side}.{ending}"] = data
    found = [records[place] for place in places]
    rows = [
        {"id": r.id, "place": place, "texts": r.texts, "target": r.target, "answers": r.answers}
        for place, r in zip(places, found, strict=True)
    ]
    parts["json"] = json.dumps(rows, ensure_ascii=False).encode()
    texts = [text for record in found for text in record.texts]
    if tokens is not None:
        ids = tokens.tokenizer.encode(texts, tokens.length, truncate=True)
        parts["tokens"] = ids.numpy().astype("<i4").tobytes()
    return parts


class _ShardWriter:
    """Writes a tar and its index under provisional names, and gives them their own when they are whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._partial = path.with_suffix(".tar.partial")
        self._file = open(self._partial, "wb")  # noqa: SIM115
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._index: list[str] = []

    def add(self, key: str, parts: dict[str, bytes]) -> None:
        """Adds a sample: ending -> bytes."""
        places = []
        for ending, data in parts.items():
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size = len(data)
            places.append(f"{ending} {self._file.tell() + BLOCK} {len(data)} {info.name}")
            self._tar.addfile(info, io.BytesIO(data))
        self._index.append(" ".join(places))
        self.bytes = self._file.tell()

    def close(self) -> dict[str, Any]:
        """Ends the shard -> its entry in the split's `.json`."""
        self._tar.close()
        self._file.close()
        os.replace(self._partial, self.path)
        lines = [f"v1.2 {len(self._index)}", *self._index]
        write_atomically(self.path.with_suffix(".idx"), ("\n".join(lines) + "\n").encode())
        return {"file": self.path.name, "samples": len(self._index), "bytes": self.path.stat().st_size}


def _samples(path: Path, collector: Collector) -> Iterator[_Sample]:
    """The samples of a tar; members that cannot be trusted, and an end that is missing, are rejected."""
    sample: _Sample | None = None
    for name, source in _members(path, collector):
        folder, _, leaf = name.rpartition("/")
        stem, _, ending = leaf.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = _Sample(key, f"{path.name}/{key}", {})
        if ending.lower() in sample.parts:
            collector.reject(f"{path.name}/{name}", Unusable("duplicate-member", f"a second {name}"), key)
        else:
            sample.parts[ending.lower()] = source
    if sample is not None:
        yield sample


def _members(path: Path, collector: Collector) -> Iterator[tuple[str, ImageSource]]:
    """The plain files of a tar that can be trusted; a tar that breaks off loses what comes after, and no more."""
    if not path.is_file():
        collector.reject(path.name, Unusable("shard-broken", f"{path.name} is no plain file"))
        return
    try:
        for member in tar_members(path):
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
                collector.reject(f"{path.name}/{shown(member.name)}", fault)
            else:
                yield name, ImageSource(str(path), member.offset, member.size)
    except Unusable as fault:
        collector.reject(path.name, fault)
    except OSError as error:
        collector.reject(path.name, Unusable("shard-broken", f"the tar cannot be read: {error.strerror or error}"))


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
        return tuple(found[side] for side in SIDES)
    if len(found) != 1:
        raise Unusable("image-missing", f"no image among {', '.join(sorted(sample.parts)) or 'nothing'}")
    return tuple(found.values())


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
    return part.read()


def _json(sample: _Sample) -> Any:
    if "json" not in sample.parts:
        raise Unusable("text-missing", f"no .json or .txt among {', '.join(sorted(sample.parts)) or 'nothing'}")
    try:
        return json.loads(_words(sample, "json").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unusable("row-broken", f"the .json is none: {error}") from error
