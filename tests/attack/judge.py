"""Who reads each kind of thing, and what was said of it: the readers are the product's own, called as commands do."""

import json
from collections.abc import Callable
from pathlib import Path

from broken import encoded, scene
from cases import Verdict
from miniatures import make_coco

from optima.coca.checkpoint import load_coca
from optima.coca.open_clip import read_state_dict
from optima.coca.open_clip_config import read_open_clip_config
from optima.commands.parse import parse
from optima.commands.prepare import check, look
from optima.data.record import ImageSource, Records
from optima.data.records import open_records
from optima.data.tokenizers import named_tokenizer
from optima.runs.words import read_words
from optima_core.checkpoint import CheckpointStore
from optima_core.errors import OptimaError

STATE = {"config": str, "step": int}
LONGEST_LINE = 2000
"""Characters of the longest line that a refusal may take."""


def judge(reader: str, path: Path) -> Verdict:
    """What the reader says; anything but a result or an error that a command shows in a line is raised."""
    try:
        return READERS[reader](path)
    except OptimaError as error:
        line = " ".join(str(error).split())
        if len(line) > LONGEST_LINE:
            raise AssertionError(f"a line of {len(line)} characters: {line[:100]}...") from error
        return Verdict("refused", line)
    except OSError as error:
        return Verdict("refused", f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}")


def _of_records(records: Records) -> Verdict:
    """What is lost of records when they are opened and when their images are decoded."""
    rejected = check(records, workers=1).records.rejected
    kinds = sorted(found.kind for found in rejected)
    for found in rejected:
        assert found.reason
        assert found.where
        assert len(found.line()) < LONGEST_LINE, found.line()[:100]
    return Verdict("rejected", " ".join(kinds)) if kinds else Verdict("accepted")


def _image(path: Path) -> Verdict:
    fault = look(ImageSource(str(path))).fault
    return Verdict("accepted") if fault is None else Verdict("rejected", fault.kind)


def _with_images(root: Path) -> None:
    (root / "images").mkdir(exist_ok=True)
    for name in ("good.jpg", "other.jpg"):
        (root / "images" / name).write_bytes(encoded(scene()))


def _captions(path: Path) -> Verdict:
    """A captions file as that of a folder with two images, good.jpg and other.jpg."""
    root = path.with_name(f"{path.name}-folder")
    _with_images(root if root.exists() else (root.mkdir() or root))
    path.rename(root / f"train{path.suffix}")
    return _of_records(open_records("folder", root, "train", max_rejected=1))


def _row(path: Path) -> Verdict:
    """A line of JSONL beside a good one."""
    line = path.read_bytes()
    good = json.dumps({"file_name": "other.jpg", "text": "a dog"}).encode()
    path.with_suffix(".jsonl").write_bytes(good + b"\n" + line + b"\n")
    return _captions(path.with_suffix(".jsonl"))


def _tar(path: Path) -> Verdict:
    """A shard beside a good one, which must lose nothing."""
    root = path.with_name(f"{path.name}-folder")
    root.mkdir()
    path.rename(root / "train-0.tar")
    from tar_cases import GOOD

    (root / "train-1.tar").write_bytes(GOOD)
    records = open_records("webdataset", root, "train", max_rejected=1)
    assert sum(record.id.startswith("train-1/") for record in records.items) == 2
    return _of_records(records)


def _annotations(path: Path) -> Verdict:
    root = path.with_name(f"{path.name}-folder")
    make_coco(root, 4)
    path.rename(root / "annotations/captions_train2017.json")
    return _of_records(open_records("coco", root, "train", max_rejected=1))


def _shards(path: Path) -> Verdict:
    return _of_records(open_records("coco", path, "train", max_rejected=1))


def _checkpoint(path: Path) -> Verdict:
    CheckpointStore(path).load(STATE)
    return Verdict("accepted")


def _config(path: Path) -> Verdict:
    parse(["distill", "--config", str(path)])
    return Verdict("accepted")


def _by(read: Callable[[Path], object]) -> Callable[[Path], Verdict]:
    def reader(path: Path) -> Verdict:
        read(path)
        return Verdict("accepted")

    return reader


READERS: dict[str, Callable[[Path], Verdict]] = {
    "image": _image,
    "captions": _captions,
    "row": _row,
    "tar": _tar,
    "annotations": _annotations,
    "shards": _shards,
    "model": _by(load_coca),
    "weights": _by(read_state_dict),
    "open_clip": _by(read_open_clip_config),
    "checkpoint": _checkpoint,
    "words": _by(read_words),
    "vocabulary": _by(lambda path: named_tokenizer(str(path)).vocab_size),
    "config": _config,
}
