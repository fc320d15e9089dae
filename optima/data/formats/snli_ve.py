"""SNLI-VE, from the JSONL files that its repository builds, with the images of Flickr30k.

    ROOT/snli_ve_{train,dev,test}.jsonl          (or in ROOT/data)
    ROOT/flickr30k-images/<Flickr30K_ID>.jpg     (or flickr30k_images, images)

A record is a hypothesis about an image. Pairs without a gold label ("-") are left out, as the benchmark does.
"""

from pathlib import Path
from typing import Any

from optima.data.formats.files import ImageFolders, find_or_refuse, read_lines
from optima.data.record import Collector, Record, Records, Unusable, clean_text, entry, identifier, name_of
from optima.task import LABELS

SPLITS = {"train": "train", "validation": "dev", "test": "test"}
IMAGE_FIELDS = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID")
"""Spellings of the field that names the image; the repository's releases do not agree."""


def read_snli_ve(root: Path, split: str) -> Records:
    """The split's hypotheses."""
    names = [f"{folder}snli_ve_{SPLITS[split]}.jsonl" for folder in ("", "data/", "annotations/")]
    path = find_or_refuse(root, names, f"the {split} pairs")
    folders = ImageFolders(
        root, ["flickr30k-images", "flickr30k_images", "images", "flickr30k/flickr30k-images", "flickr30k/images"]
    )
    collector = Collector()

    def make(row: Any) -> Record | None:
        name = identifier(entry(row, "pairID"), "pairID")
        label = entry(row, "gold_label")
        if label == "-":
            collector.left_out["no gold label"] += 1
            return None
        if label not in LABELS:
            raise Unusable("label-unknown", f"gold_label must be one of {', '.join(LABELS)}, got {label!r:.80}")
        field = next((field for field in IMAGE_FIELDS if field in row), IMAGE_FIELDS[0])
        image = identifier(entry(row, field), field).removesuffix(".jpg")
        source = folders.source(f"{image}.jpg")
        text = clean_text(entry(row, "sentence2"), "a hypothesis")
        return Record(name, (source,), (text,), LABELS.index(label))

    for where, row in read_lines(path, collector):
        collector.take(where, name_of(row, "pairID"), make, row)
    return collector.records("snli_ve", split, "snli_ve", LABELS)
