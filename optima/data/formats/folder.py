"""A plain folder of images with their captions in a TSV or JSONL file.

    ROOT/captions.{tsv,jsonl}, or ROOT/{train,validation,test}.{tsv,jsonl}; also metadata.jsonl
    ROOT/**/*.{jpg,png,...}      file names in the captions are relative to ROOT or ROOT/images

TSV: file name, tab, caption; a heading is recognised by its words (file_name, filename, filepath, image; caption,
text, title). JSONL: objects with such fields; `captions` may give several. Lines that name the same file are captions
of one image. If there is one file for all, every twentieth image (by a hash of its name) is validation and every
next one test, so that an image never changes sides when others are added; rows that name no image count as train's.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optima.data.formats.files import ImageFolders, find, find_or_refuse, read_lines, text_lines
from optima.data.record import Collector, Record, Records, Unusable, clean_text, safe_name

NAMES = ("file_name", "filename", "filepath", "file", "image")
CAPTIONS = ("caption", "text", "title", "captions", "texts")
SHARED = [f"{stem}.{end}" for stem in ("captions", "metadata") for end in ("tsv", "jsonl")]
HELD_OUT = {0: "validation", 1: "test"}
HELD_OUT_OF = 20


def read_folder(root: Path, split: str) -> Records:
    """The split's images."""
    own = find(root, [f"{split}.tsv", f"{split}.jsonl"])
    path = own or find_or_refuse(root, SHARED, f"the captions ({split}.tsv, {split}.jsonl, or for all splits)")
    folders = ImageFolders(root, [".", "images"])
    collector = Collector()
    captions: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    nameless = collector if own is not None or split == "train" else Collector()
    rows = _tsv(path, nameless) if path.suffix == ".tsv" else _jsonl(path, nameless)
    for where, name, texts in rows:
        if own is None and split != _side_of_row(name):
            continue
        try:
            name = safe_name(name)
            usable = [clean_text(text, "a caption") for text in texts]
            if not usable:
                raise Unusable("text-missing", f"image {name} has no caption")
        except Unusable as fault:
            collector.reject(where, fault, name if isinstance(name, str) else "")
        else:
            captions.setdefault(name, []).extend(usable)
            places.setdefault(name, where)

    def make(name: str, texts: tuple[str, ...]) -> Record:
        return Record(name, (folders.source(name),), texts)

    for name, found in captions.items():
        unique = tuple(dict.fromkeys(found))
        collector.take(places[name], name, make, name, unique)
    return collector.records("folder", split, "captioning")


def side(name: str) -> str:
    """The split of an image where one file holds the captions of all."""
    return HELD_OUT.get(zlib.crc32(name.encode("utf-8", "replace")) % HELD_OUT_OF, "train")


def _side_of_row(name: Any) -> str:
    """The split of a row, by the image that it names; of none, a row is train's, so that it is lost once."""
    try:
        return side(safe_name(name))
    except Unusable:
        return "train"


def _tsv(path: Path, collector: Collector) -> Iterator[tuple[str, Any, list[Any]]]:
    columns: tuple[int, int] | None = None
    for where, line in text_lines(path, collector):
        cells = line.split("\t")
        if columns is None:
            words = [cell.strip().lower() for cell in cells]
            name = next((place for place, word in enumerate(words) if word in NAMES), None)
            caption = next((place for place, word in enumerate(words) if word in CAPTIONS), None)
            columns = (0, 1) if name is None or caption is None else (name, caption)
            if name is not None and caption is not None:
                continue
        if len(cells) <= max(columns):
            collector.reject(
                where, Unusable("row-type", f"a file name, a tab and a caption are wanted, got {line!r:.80}")
            )
            continue
        yield where, cells[columns[0]].strip(), [cells[columns[1]]]


def _jsonl(path: Path, collector: Collector) -> Iterator[tuple[str, Any, list[Any]]]:
    for where, row in read_lines(path, collector):
        if not isinstance(row, dict):
            collector.reject(where, Unusable("row-type", f"an object is wanted, got {row!r:.80}"))
            continue
        name = next((row[field] for field in NAMES if field in row), None)
        found: Any = next((row[field] for field in CAPTIONS if field in row), [])
        yield where, name, found if isinstance(found, list) else [found]
