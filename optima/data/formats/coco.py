"""COCO captions, from the annotation files of the site or from Karpathy's split of them.

    ROOT/annotations/captions_{train,val}{2017,2014}.json   (the files may lie in ROOT itself)
    ROOT/annotations/{image_info_test,instances_val}{2017,2014}.json   images without captions: predictions only
    ROOT/{train,val,test}{2017,2014}/*.jpg                  (or under ROOT/images)

    ROOT/dataset_coco.json                                  Karpathy: train takes "train" and "restval"
    ROOT/{train,val}2014/*.jpg

A record is an image with all its captions.
"""

from pathlib import Path
from typing import Any

from optima.data.formats.files import ImageFolders, find_or_refuse, read_json, rows_of
from optima.data.record import Collector, ImageSource, Record, Records, Unusable, clean_text, entry, identifier, name_of

YEARS = ("2017", "2014")
KARPATHY = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}


def read_coco(root: Path, split: str) -> Records:
    """The split of the site's own files; test, and a validation split without captions, has no references."""
    short = {"train": "train", "validation": "val", "test": "test"}[split]
    stems = [f"captions_{short}{year}" for year in YEARS]
    if split == "validation":
        stems += [f"instances_{short}{year}" for year in YEARS]
    if split == "test":
        stems = [f"image_info_{short}{year}" for year in YEARS]
    path = find_or_refuse(
        root, [f"{folder}{stem}.json" for stem in stems for folder in ("annotations/", "")], f"the {split} annotations"
    )
    content = read_json(path)
    year = path.stem[-4:]
    folders = ImageFolders(root, [f"{short}{year}", f"images/{short}{year}", f"{short}{year}/{short}{year}"])
    captioned = path.stem.startswith("captions_")
    collector = Collector()
    captions = _captions(content, path, collector) if captioned else {}

    def make(row: Any) -> Record:
        name = identifier(entry(row, "id"), "an image id")
        source = folders.source(entry(row, "file_name"))
        texts = captions.get(name, [])
        if captioned and not texts:
            raise Unusable("text-missing", f"image {name} has no usable caption")
        return Record(name, (source,), tuple(texts))

    images = rows_of(content, "images", path)
    for number, row in enumerate(images):
        collector.take(f"{path.name} images[{number}]", name_of(row, "id"), make, row)
    known = {name_of(row, "id") for row in images}
    for name in captions:
        if name not in known:
            collector.reject(
                path.name, Unusable("image-unknown", f"captions of image {name}, which is not listed"), name
            )
    return collector.records("coco", split, "captioning")


def read_coco_karpathy(root: Path, split: str) -> Records:
    """Karpathy's split: 113,287 images to train on, 5,000 each to validate and test."""
    path = find_or_refuse(root, ["dataset_coco.json", "annotations/dataset_coco.json"], "Karpathy's split")
    collector = Collector()
    images: dict[str, ImageFolders] = {}

    def folders(name: str) -> ImageFolders:
        if name not in images:
            images[name] = ImageFolders(root, [name, f"images/{name}"])
        return images[name]

    def make(where: str, row: Any) -> Record | None:
        told = row.get("split") if isinstance(row, dict) else None
        if told not in KARPATHY[split]:
            # A row of no split is lost once, not once for every split that is read.
            if split == "train" and not any(told in names for names in KARPATHY.values()):
                raise Unusable("split-unknown", f"split must be train, restval, val or test, got {told!r:.80}")
            return None
        filename = entry(row, "filename")
        name = identifier(row.get("cocoid", filename), "cocoid")
        source = _karpathy_source(folders, row.get("filepath", ""), filename)
        texts = []
        sentences = entry(row, "sentences")
        for place, sentence in enumerate(sentences if isinstance(sentences, list) else []):
            try:
                texts.append(clean_text(entry(sentence, "raw"), "a caption"))
            except Unusable as fault:
                collector.reject(f"{where}.sentences[{place}]", fault, name)
        if not texts:
            raise Unusable("text-missing", f"image {name} has no usable caption")
        return Record(name, (source,), tuple(texts))

    for number, row in enumerate(rows_of(read_json(path), "images", path)):
        where = f"{path.name} images[{number}]"
        collector.take(where, name_of(row, "cocoid"), make, where, row)
    return collector.records("coco_karpathy", split, "captioning")


def _karpathy_source(folders: Any, folder: Any, filename: Any) -> ImageSource:
    if folder not in ("train2014", "val2014"):
        raise Unusable("unsafe-name", f"filepath must be train2014 or val2014, got {folder!r:.80}")
    source: ImageSource = folders(folder).source(filename)
    return source


def _captions(content: Any, path: Path, collector: Collector) -> dict[str, list[str]]:
    """Captions by image id, in the order of the file; unusable ones are rejected one by one."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for number, row in enumerate(rows_of(content, "annotations", path)):
        name = ""
        try:
            name = identifier(entry(row, "image_id"), "image_id")
            caption_id = identifier(entry(row, "id"), "a caption id")
            if caption_id in seen:
                raise Unusable("duplicate-id", f"caption id {caption_id} was seen before")
            text = clean_text(entry(row, "caption"), "a caption")
        except Unusable as fault:
            collector.reject(f"{path.name} annotations[{number}]", fault, name)
        else:
            seen.add(caption_id)
            found.setdefault(name, []).append(text)
    return found
