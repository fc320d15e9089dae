"""NLVR2, from the JSONL files of its repository (which are called .json there).

    ROOT/data/{train,dev,test1,test2}.json       (or in ROOT itself)
    ROOT/images/train/<directory>/<set>-img{0,1}.png, ROOT/{dev,test1,test2}/<set>-img{0,1}.png   (or under ROOT/images)

A record is a statement about two images, left and right. Its text groups the pairs for NLVR2's consistency.
"""

from pathlib import Path
from typing import Any

from optima.data.formats.files import ImageFolders, find_or_refuse, read_lines
from optima.data.record import Collector, Record, Records, Unusable, clean_text, entry, identifier, name_of
from optima.task import TRUTHS

SPLITS = {"train": "train", "validation": "dev", "test": "test1", "test2": "test2"}


def read_nlvr2(root: Path, split: str) -> Records:
    """The split's statements; "test" is the public test1. The class of a statement without a label is -1."""
    official = SPLITS[split]
    names = [f"{folder}{official}.{end}" for folder in ("", "data/", "nlvr2/data/") for end in ("json", "jsonl")]
    path = find_or_refuse(root, names, f"the {split} statements")
    folders = ImageFolders(root, [f"images/{official}", official])
    collector = Collector()

    def make(row: Any) -> Record:
        name = identifier(entry(row, "identifier"), "identifier")
        text = clean_text(entry(row, "sentence"), "a sentence")
        parts = name.rsplit("-", 1)
        if len(parts) != 2:
            raise Unusable("id-type", f"identifier must be split-set-pair-sentence, got {name!r:.80}")
        folder = f"{row['directory']}/" if "directory" in row else ""
        sources = tuple(
            folders.source(f"{folder}{parts[0]}-img{side}.png", f"{parts[0]}-img{side}.png") for side in (0, 1)
        )
        return Record(name, sources, (text,), _target(row))

    for where, row in read_lines(path, collector):
        collector.take(where, name_of(row, "identifier"), make, row)
    return collector.records("nlvr2", split, "nlvr2", TRUTHS)


def _target(row: dict[str, Any]) -> int:
    if "label" not in row:
        return -1
    label = str(row["label"]).lower()
    if label not in TRUTHS:
        raise Unusable("label-unknown", f"label must be True or False, got {row['label']!r:.80}")
    return TRUTHS.index(label)
