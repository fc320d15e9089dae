"""Rows that cannot be used: named and counted once, by every command, and never at the cost of the others."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from broken import encoded, scene
from miniatures import make_coco, make_folder, make_karpathy
from PIL import Image

from optima.data.images import inspect
from optima.data.record import Rejection, RejectionLog, Unusable
from optima.data.records import open_records
from optima.limits import MAX_DECODED_BYTES, MAX_LINE_BYTES
from optima_core.errors import OptimaError

OVERLONG = {"letters": "a" * 300 + "/x.jpg", "levels": "d/" * 3000 + "x.jpg", "leaf": "b" * 5000 + ".jpg"}


@pytest.mark.parametrize("name", OVERLONG)
def test_a_path_that_no_file_system_takes_costs_its_own_item(name: str, tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(encoded(scene()))
    rows = [{"image": "good.jpg", "text": "a cat"}, {"image": OVERLONG[name], "text": "a dog"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = open_records("folder", tmp_path, "train", max_rejected=0.5)
    assert [record.id for record in records.items] == ["good.jpg"]
    (lost,) = records.rejected
    assert lost.kind in ("image-unreadable", "image-missing")
    assert lost.where == "train.jsonl:2"
    assert len(lost.id) + len(lost.reason) < 1000


def test_an_overlong_path_in_coco_costs_its_own_item(tmp_path: Path) -> None:
    path = make_coco(tmp_path, 6) / "annotations/captions_train2017.json"
    content = json.loads(path.read_text())
    content["images"][2]["file_name"] = OVERLONG["levels"]
    path.write_text(json.dumps(content))
    records = open_records("coco", tmp_path, "train", max_rejected=0.5)
    assert len(records) == 5
    assert [found.kind for found in records.rejected] == ["image-unreadable"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_costs_its_own_items(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "images").chmod(0)
    with pytest.raises(OptimaError, match="image-unreadable"):
        open_records("folder", tmp_path, "train")


def test_a_broken_row_of_a_shared_file_is_counted_once(tmp_path: Path) -> None:
    make_folder(tmp_path, 60)
    lines = (tmp_path / "train.tsv").read_text().splitlines()
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.tsv").unlink()
    broken = ["no tab in it", "../up.jpg\ta cat", "\x00.jpg\ta cat"]
    (tmp_path / "captions.tsv").write_bytes("\n".join(lines + broken).encode() + b"\nlatin\xe4.jpg\ta cat\n")
    found = [open_records("folder", tmp_path, split, max_rejected=0.5) for split in ("train", "validation", "test")]
    assert [len(records.rejected) for records in found] == [4, 0, 0]
    assert Counter(lost.kind for lost in found[0].rejected) == {"row-type": 1, "unsafe-name": 2, "row-encoding": 1}


def test_a_row_with_a_name_counts_for_the_split_of_its_image(tmp_path: Path) -> None:
    make_folder(tmp_path, 60)
    names = [line.split("\t")[0] for line in (tmp_path / "train.tsv").read_text().splitlines()[1:]]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.tsv").unlink()
    rows = [{"image": f"./{name}", "text": "a cat"} for name in dict.fromkeys(names)]
    rows += [{"image": name, "text": ""} for name in dict.fromkeys(names)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [open_records("folder", tmp_path, split, max_rejected=0.6) for split in ("train", "validation", "test")]
    assert sum(len(records) for records in found) == 60
    for records in found:
        assert {record.id for record in records.items} == {lost.id for lost in records.rejected}


def test_a_row_of_no_split_is_lost_once(tmp_path: Path) -> None:
    path = make_karpathy(tmp_path) / "dataset_coco.json"
    content = json.loads(path.read_text())
    del content["images"][0]["split"]
    content["images"][1]["split"] = ["train"]
    content["images"].append("no object")
    path.write_text(json.dumps(content))
    found = [open_records("coco_karpathy", tmp_path, split, max_rejected=0.9) for split in ("train", "validation")]
    assert [[lost.kind for lost in records.rejected] for records in found] == [["split-unknown"] * 3, []]


def test_a_line_without_end_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(encoded(scene()))
    good = b'{"image": "good.jpg", "text": "a cat"}\n'
    (tmp_path / "train.jsonl").write_bytes(b"[" * (2 * MAX_LINE_BYTES + 5) + b"\n" + good)
    records = open_records("folder", tmp_path, "train", max_rejected=0.5)
    assert len(records) == 1
    assert [(lost.kind, lost.where) for lost in records.rejected] == [("row-overlong", "train.jsonl:1")]


def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(encoded(scene()))
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(OptimaError, match="no plain file"):
        open_records("folder", tmp_path, "train")
    os.mkfifo(tmp_path / "train-0.tar")
    with pytest.raises(OptimaError, match="shard-broken 1"):
        open_records("webdataset", tmp_path, "train")


def test_a_log_names_each_item_once_however_often_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rejected.jsonl"
    first, second = (Rejection(name, "a.tsv:1", "row-type", "no row") for name in "ab")
    RejectionLog(path).add([])
    assert not path.parent.exists()
    log = RejectionLog(path)
    log.add([first, first])
    log.add([first])
    RejectionLog(path).add([first, second])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]
    path.write_text(path.read_text()[:-9])  # as a kill or a full disk leaves it
    RejectionLog(path).add([first, second])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]
    RejectionLog(None).add([first])


LARGE = {
    "PNG": ("RGB", 4),
    "TIFF": ("F", 4),
    "WEBP": ("RGB", 16),
    "JPEG2000": ("RGB", 24),
}


@pytest.mark.parametrize("form", LARGE)
def test_a_image_above_the_bytes_of_its_kind_is_a_bomb(form: str) -> None:
    mode, cost = LARGE[form]
    width = 12_000
    height = MAX_DECODED_BYTES // cost // width + 1
    image = Image.new(mode, (width, height))
    data = encoded(image, form, **({"lossless": True, "method": 0} if form == "WEBP" else {}))
    with pytest.raises(Unusable, match="pixels of its kind are the most") as caught:
        inspect(data)
    assert caught.value.kind == "image-bomb"


PEAK = """
import resource, sys
from optima.data.images import decode, inspect
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(data, inspect(data))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("form", ["TIFF", "WEBP"])
def test_a_image_just_below_the_limit_costs_little_more_than_the_limit(form: str, tmp_path: Path) -> None:
    """The decoder's pixels, and ours, which are three bytes each."""
    mode, cost = LARGE[form]
    image = Image.new(mode, (4096, MAX_DECODED_BYTES // cost // 4096))
    options = {"lossless": True, "method": 0} if form == "WEBP" else {}
    (tmp_path / "large").write_bytes(encoded(image, form, **options))
    found = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "large")], capture_output=True, check=True)
    assert int(found.stdout) < 2 * MAX_DECODED_BYTES
