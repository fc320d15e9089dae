"""Writes tar shards in WebDataset's layout, as `optima.data.shards` reads them.

    OUT/train.json              what was packed: name, task, classes, shards, tokenizer
    OUT/train-000000.tar        000000000.jpg (or .left.jpg and .right.jpg), .json and .tokens of each sample
    OUT/train-000000.idx        where each component lies, for DALI's `fn.readers.webdataset`

A sample is an image, or a pair of them, once, with all its records: `.json` lists them, `.tokens` holds one row of
int32 token ids (little-endian, text_length of them) for each of their texts in turn.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optima.data.images import FORMATS, inspect
from optima.data.record import ImageSource, Records
from optima.data.shards import SIDES, VERSION
from optima.data.tar_index import BLOCK
from optima.data.tokenizer import Tokenizer
from optima_core.checkpoint import write_atomically

ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"} | {
    name: name.lower() for name in FORMATS if name not in ("JPEG", "TIFF", "JPEG2000")
}


class Tokens(NamedTuple):
    """How texts are turned into the rows of `.tokens`; longer texts are cut."""

    name: str
    tokenizer: Tokenizer
    length: int


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
