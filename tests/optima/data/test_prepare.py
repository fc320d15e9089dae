"""From a data root to shards and back: the same records, the same images, in DALI's own reader too."""

import errno
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import MAKERS, make_coco, make_vqav2
from PIL import Image

from optima.commands.prepare import prepare
from optima.data.config import DataName, LoaderConfig, PrepareConfig, TransformConfig
from optima.data.loader import make_loader
from optima.data.packing import Tokens, pack
from optima.data.record import Unusable
from optima.data.records import FORMATS, open_records
from optima.data.tokenizer import word_tokenizer
from optima.run import main
from optima_core.errors import OptimaError


@pytest.mark.parametrize("name", MAKERS)
def test_packed_shards_hold_the_same_records_and_images(name: DataName, tmp_path: Path) -> None:
    root, out = MAKERS[name](tmp_path / "root"), tmp_path / "out"
    reports = prepare(PrepareConfig(name, root, out=out, workers=1))
    assert {report.records.split for report in reports} == set(FORMATS[name].splits) - {"test-dev", "test2"}
    for report in reports:
        split = report.records.split
        files, packed = open_records(name, root, split), open_records(name, out, split)
        assert not packed.rejected
        assert [record.id for record in packed.items] == [record.id for record in files.items]
        assert (packed.task, packed.classes, packed.left_out) == (files.task, files.classes, files.left_out)
        for ours, theirs in zip(packed.items, files.items, strict=True):
            assert (ours.texts, ours.target, ours.answers) == (theirs.texts, theirs.target, theirs.answers)
            assert [source.read() for source in ours.images] == [source.read() for source in theirs.images]


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_format_is_loaded_from_files_and_from_shards_alike(name: DataName, engine: str, tmp_path: Path) -> None:
    if engine == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is optional")
    root, out = MAKERS[name](tmp_path / "root"), tmp_path / "out"
    prepare(PrepareConfig(name, root, ["train"], out, workers=1))
    config = LoaderConfig(engine, 0, transform=TransformConfig(image_size=32))  # type: ignore[arg-type]
    files, shards = (
        make_loader(open_records(name, place, "train"), config, batch_size=5, seed=1) for place in (root, out)
    )
    with files, shards:
        for step in range(4):
            for ours, theirs in zip(files.load(step), shards.load(step), strict=True):
                assert torch.equal(ours, theirs)


def test_a_image_with_several_records_is_packed_once(tmp_path: Path) -> None:
    root, out = make_vqav2(tmp_path / "root"), tmp_path / "out"
    prepare(PrepareConfig("vqav2", root, ["train"], out, workers=1))
    with tarfile.open(out / "train-000000.tar") as tar:
        names = [name.partition(".")[2] for name in tar.getnames()]
    assert names.count("jpg") == names.count("json") == 6
    assert len(open_records("vqav2", out, "train")) == 12


def test_packed_answers_fit_a_trained_models_vocabulary(tmp_path: Path) -> None:
    root, out = make_vqav2(tmp_path / "root"), tmp_path / "out"
    prepare(PrepareConfig("vqav2", root, ["train"], out, workers=1))
    classes = open_records("vqav2", root, "train").classes[1:][::-1]
    ours, theirs = (open_records("vqav2", place, "train", classes=classes) for place in (out, root))
    assert ours.classes == theirs.classes == classes
    assert [(r.id, r.target) for r in ours.items] == [(r.id, r.target) for r in theirs.items]


def test_shards_are_closed_at_their_size_and_hold_tokens_as_int32(tmp_path: Path) -> None:
    root, out = make_coco(tmp_path / "root", 12), tmp_path / "out"
    records = open_records("coco", root, "train")
    shards = pack(records, out, 20_000, Tokens("words", word_tokenizer(), 14))
    assert len(shards) > 1
    texts = [text for record in records.items for text in record.texts]
    rows = []
    for shard in shards:
        assert shard.stat().st_size < 20_000 + 20_000
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".tokens"):
                    file = tar.extractfile(member)
                    assert file is not None
                    rows.append(np.frombuffer(file.read(), "<i4").reshape(-1, 14))
    assert np.array_equal(np.concatenate(rows), word_tokenizer().encode(texts, 14, truncate=True).numpy())


def test_dalis_own_reader_reads_the_shards_by_their_indices(tmp_path: Path) -> None:
    """Images and tokens come out of `fn.readers.webdataset` as they went in."""
    dali = pytest.importorskip("nvidia.dali", reason="DALI is optional")
    from nvidia.dali import fn, types

    root, out = make_coco(tmp_path / "root", 6), tmp_path / "out"
    prepare(PrepareConfig("coco", root, ["train"], out, tokenizer="words", text_length=14, workers=1))

    @dali.pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def graph() -> tuple[object, ...]:
        images, tokens = fn.readers.webdataset(
            paths=[str(out / "train-000000.tar")],
            index_paths=[str(out / "train-000000.idx")],
            ext=["jpg", "tokens"],
            dtypes=[types.UINT8, types.INT32],
        )
        return images, tokens

    images, tokens = graph().run()
    for place, record in enumerate(open_records("coco", root, "train").items):
        assert np.array(images.at(place)).tobytes() == record.images[0].read()
        expected = word_tokenizer().encode(record.texts, 14, truncate=True).numpy()
        assert np.array_equal(np.array(tokens.at(place)).reshape(-1, 14), expected)


def test_a_packing_that_breaks_off_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    root, out = make_coco(tmp_path / "root", 4), tmp_path / "out"
    records = open_records("coco", root, "train")
    pack(records, out, 1, None)
    assert len(open_records("coco", out, "train")) == 4
    Path(records[3].images[0].path).unlink()
    with pytest.raises(Unusable):
        pack(records, out, 1, None)
    with pytest.raises(OptimaError):
        open_records("coco", out, "train")


def test_a_full_disk_is_told_by_the_name_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_coco(tmp_path / "root", 4), tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("optima.data.packing.tarfile.TarFile.addfile", full)
    assert main(f"prepare --data coco --root {root} --splits [train] --out {out} --workers 1".split()) == 2
    assert capsys.readouterr().err == f"optima: {out} cannot be written to: No space left on device; start again\n"


def test_shards_of_something_else_or_with_a_part_missing_are_refused(tmp_path: Path) -> None:
    root, out = make_coco(tmp_path / "root", 4), tmp_path / "out"
    prepare(PrepareConfig("coco", root, ["train"], out, workers=1))
    with pytest.raises(OptimaError, match=r"train\.json holds coco, not folder"):
        open_records("folder", out, "train")
    shard = out / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(OptimaError, match=r"train-000000\.tar is missing or not whole"):
        open_records("coco", out, "train")
    content = json.loads((out / "train.json").read_text())
    (out / "train.json").write_text(json.dumps(content | {"optima_shards": 99}))
    with pytest.raises(OptimaError, match="is of version 99, 1 is wanted"):
        open_records("coco", out, "train")


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [{"bytes": 3}]},
        {"shards": None},
        {"shards": [None]},
        {"shards": [{"file": "../../train-000000.tar", "bytes": 1}]},
        {"shards": [{"file": "train-000000.tar", "bytes": "1"}]},
        {"left_out": None},
        {"left_out": {"a": "b"}},
        {"classes": None},
        {"classes": [1]},
        {"task": "painting"},
        {"task": []},
        {"name": ["coco"]},
        {"optima_shards": [1]},
    ],
    ids=str,
)
def test_a_list_of_shards_of_another_shape_is_one_line(change: dict[str, object], tmp_path: Path) -> None:
    root, out = make_coco(tmp_path / "root", 4), tmp_path / "out"
    prepare(PrepareConfig("coco", root, ["train"], out, workers=1))
    content = json.loads((out / "train.json").read_text())
    (out / "train.json").write_text(json.dumps({"optima_shards": 1} | content | change))
    with pytest.raises(OptimaError, match=r"train\.json") as caught:
        open_records("coco", out, "train")
    assert "\n" not in str(caught.value)
    (out / "train.json").write_text(json.dumps([{"optima_shards": 1}]))
    with pytest.raises(OptimaError, match=r"train\.json"):
        open_records("coco", out, "train")


def test_the_command_checks_and_packs_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = make_coco(tmp_path / "root", 4), tmp_path / "out"
    for image in (root / "test2017").iterdir():
        image.unlink()
    (root / "test2017").rmdir()
    assert main(["prepare", "--data", "coco", "--root", str(root), "--out", str(out), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "test: not there:" in printed
    assert "lacks the images: folder test2017" in printed
    assert "packed 2 shards" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "converted.jsonl",
        "rejected.jsonl",
        "train-000000.idx",
        "train-000000.tar",
        "train.json",
        "validation-000000.idx",
        "validation-000000.tar",
        "validation.json",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "coco", "--root", "nowhere"], "data root nowhere is not a folder"),
        (["--data", "coco", "--root", ".", "--splits", "[holdout]"], "coco has no split 'holdout'"),
        (["--data", "imagenet", "--root", "."], "data must be"),
        (["--data", "coco", "--root", ".", "--shard_mib", "0"], "shard_mib and answers must be at least 1"),
    ],
)
def test_mistakes_end_in_one_line(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "test, read with the words of train: 2 of 4 different words, 50.0 % of all, are not in the vocabulary"),
        (["--tokenizer", "words"], "test, read with the tokenizer words: 3 of 4 different words, 75.0 % of all"),
    ],
)
def test_words_that_a_vocabulary_lacks_are_counted(
    options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(root / f"{name}.png")
    (root / "train.tsv").write_text("a.png\ta yurt\n")
    (root / "test.tsv").write_text("b.png\ta yurt eats quinces\n")
    words = ["prepare", "--data", "folder", "--root", str(root), "--out", str(tmp_path / "out"), "--pack", "false"]
    assert main([*words, *options]) == 0
    told = capsys.readouterr().out
    assert line in told
    assert ("train, read" in told) == bool(options)
