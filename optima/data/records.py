"""Data sets by name: `open_records("vqav2", root, "train")` -> `Records`.

| name | task | what it reads |
|---|---|---|
| `coco` | captioning | captions_*.json of the site, images of 2017 or 2014 |
| `coco_karpathy` | captioning | dataset_coco.json |
| `vqav2` | vqa | question and annotation files, images of 2014 and 2015 |
| `nlvr2` | nlvr2 | the repository's JSONL, two images a record |
| `snli_ve` | snli_ve | the repository's JSONL, images of Flickr30k |
| `folder` | captioning | a folder of images with captions.tsv or .jsonl |
| `webdataset` | captioning | tars of images with .txt or .json captions |

The readers are in `optima.data.formats`; each says in its first lines where it looks for which file. Instead of the
official files, the root may hold the shards that `optima prepare` packed from them. Shards, packed ones
and those of `webdataset`, may lie at an address instead of in a folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optima.data.answers import agreed_answer
from optima.data.config import ANSWERS, DataName
from optima.data.find_shards import is_pattern
from optima.data.formats.coco import KARPATHY, read_coco, read_coco_karpathy
from optima.data.formats.folder import read_folder
from optima.data.formats.nlvr2 import SPLITS as NLVR2_SPLITS
from optima.data.formats.nlvr2 import read_nlvr2
from optima.data.formats.snli_ve import SPLITS as SNLI_VE_SPLITS
from optima.data.formats.snli_ve import read_snli_ve
from optima.data.formats.vqav2 import SPLITS as VQAV2_SPLITS
from optima.data.formats.vqav2 import read_vqav2
from optima.data.record import ImageSource, Record, Records, Rejection, write_rejections
from optima.data.remote import is_address, joined
from optima.data.shards import is_packed, read_packed, read_webdataset
from optima.task import Task
from optima.untrusted import shown
from optima_core.errors import OptimaError

Reader = Callable[[str | Path, str, int, Sequence[str] | None, Path | None], Records]
"""(root, split, answers, classes, index) -> records."""


@dataclass(frozen=True)
class DataFormat:
    """A registered format: its task, its splits, its reader, and whether that reads an address, too."""

    task: Task
    splits: tuple[str, ...]
    read: Reader
    remote: bool = False


def _plain(read: Callable[[Path, str], Records]) -> Reader:
    return lambda root, split, *_: read(Path(root), split)


def _read_vqav2(
    root: str | Path, split: str, answers: int, classes: Sequence[str] | None, index: Path | None
) -> Records:
    return read_vqav2(Path(root), split, answers, classes)


_SPLITS = ("train", "validation", "test")
FORMATS: dict[DataName, DataFormat] = {
    "coco": DataFormat("captioning", _SPLITS, _plain(read_coco)),
    "coco_karpathy": DataFormat("captioning", tuple(KARPATHY), _plain(read_coco_karpathy)),
    "vqav2": DataFormat("vqa", tuple(VQAV2_SPLITS), _read_vqav2),
    "nlvr2": DataFormat("nlvr2", tuple(NLVR2_SPLITS), _plain(read_nlvr2)),
    "snli_ve": DataFormat("snli_ve", tuple(SNLI_VE_SPLITS), _plain(read_snli_ve)),
    "webdataset": DataFormat(
        "captioning", _SPLITS, lambda root, split, _, __, index: read_webdataset(root, split, index), remote=True
    ),
    "folder": DataFormat("captioning", _SPLITS, _plain(read_folder)),
}


def open_records(
    name: DataName,
    root: str | Path,
    split: str,
    *,
    max_rejected: float = 0.01,
    answers: int = ANSWERS,
    classes: Sequence[str] | None = None,
    index: Path | None = None,
) -> Records:
    """Reads the records of a split. Images are looked for, but not opened: that is `prepare`'s and the loader's work.

    Args:
        name: the format.
        root: the data root, laid out as the format's reader says; of shards also an address.
        split: "train", "validation", "test", or a further split of the benchmark; of webdataset also a pattern of tars.
        max_rejected: share of the items, 0 to 1, that may be unusable; 1 takes what there is.
        answers: size of VQAv2's answer vocabulary.
        classes: VQAv2's answer vocabulary, if it is given by a trained model.
        index: folder of the index of large or remote shards; None takes the user's cache.

    Raises:
        OptimaError: if the format, the split or a file does not exist, or too many items are unusable.
    """
    if name not in FORMATS:
        raise OptimaError(f"data {name!r} is unknown; known are {', '.join(FORMATS)}")
    found = FORMATS[name]
    tars = name == "webdataset" and is_pattern(split)
    if split not in found.splits and not tars:
        raise OptimaError(f"{name} has no split {shown(split)!r}; it has {', '.join(found.splits)}")
    if not is_address(root) and not Path(root).is_dir():
        raise OptimaError(f"data root {root} is not a folder")
    if not tars and is_packed(root, split):
        records = read_packed(root, name, split, index)
        if classes is not None and records.task == "vqa" and tuple(classes) != records.classes:
            records = _with_classes(records, tuple(classes))
    elif is_address(root) and not found.remote:
        missing = joined(str(root), f"{split}.json")
        raise OptimaError(f"there is no {shown(missing)}: at an address, {name} is read from what `prepare` packed")
    else:
        records = found.read(root, split, answers, classes, index)
    records.refuse_above(max_rejected)
    return records


def _with_classes(records: Records, classes: tuple[str, ...]) -> Records:
    """Packed VQAv2 records in the terms of another answer vocabulary."""
    vocabulary = {answer: target for target, answer in enumerate(classes)}
    items = [replace(record, target=agreed_answer(record.answers, vocabulary)) for record in records.items]
    if records.split == "train":
        items = [record for record in items if record.target >= 0]
    return replace(records, items=items, classes=classes)


__all__ = [
    "FORMATS",
    "DataFormat",
    "ImageSource",
    "Record",
    "Records",
    "Rejection",
    "open_records",
    "write_rejections",
]
