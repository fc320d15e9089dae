"""Shards with an index: as those in memory, found by name and by pattern, and never other ones."""

import io
import json
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from broken import encoded, scene
from miniatures import make_nlvr2, make_vqav2, make_webdataset
from same_records import assert_equal_batches, assert_same, batches_of

from optima.commands.prepare import prepare
from optima.data import find_shards, shards
from optima.data.config import DataName, PrepareConfig
from optima.data.record import ImageSource, Unusable
from optima.data.records import open_records
from optima.data.shard_index import IndexedRecords
from optima_core.errors import OptimaError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Indices go into the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_webdataset(tmp_path_factory.mktemp("served") / "tars", 20)


@pytest.mark.parametrize("name", ["webdataset", "vqav2", "nlvr2"])
def test_large_local_shards_open_from_an_index_as_small_ones_do_from_memory(
    name: DataName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers = {"webdataset": make_webdataset, "vqav2": make_vqav2, "nlvr2": make_nlvr2}
    root, out = makers[name](tmp_path / "root", 14), tmp_path / "out"
    prepare(PrepareConfig(name, root, ["train"], out, workers=1, shard_mib=1))
    for place in (out, root) if name == "webdataset" else (out,):
        monkeypatch.setattr(shards, "IN_MEMORY", 2**30)
        expected = open_records(name, place, "train")
        monkeypatch.setattr(shards, "IN_MEMORY", 0)
        for _ in range(2):
            found = open_records(name, place, "train", index=tmp_path / "index")
            assert isinstance(found.items, IndexedRecords)
            assert not isinstance(expected.items, IndexedRecords)
            assert_same(found, expected)
            assert [record.id for record in found.items[2:9:3]] == [record.id for record in expected.items[2:9:3]]
            assert found[-1].id == expected[len(expected) - 1].id
            assert_equal_batches(batches_of(found, 5), batches_of(expected, 5))


def test_what_cannot_be_used_of_a_shard_is_named_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_webdataset(tmp_path / "root", 12)
    path = root / "train-0001.tar"
    path.write_bytes(path.read_bytes()[:-9000])
    with tarfile.open(root / "train-0002.tar", "w") as tar:
        for name, data in (("a.jpg", encoded(scene())), ("../b.txt", b"a cat"), ("a.json", b"{"), ("c.txt", b"a dog")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    expected = open_records("webdataset", root, "train", max_rejected=1)
    assert len(expected.rejected) >= 3
    monkeypatch.setattr(shards, "IN_MEMORY", 0)
    for _ in range(2):
        assert_same(open_records("webdataset", root, "train", max_rejected=1), expected)
    with pytest.raises(OptimaError, match="cannot be used"):
        open_records("webdataset", root, "train", max_rejected=0.01)


def test_only_shards_that_changed_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, other = make_webdataset(tmp_path / "root", 12), make_webdataset(tmp_path / "other", 16)
    monkeypatch.setattr(shards, "IN_MEMORY", 0)
    before = open_records("webdataset", root, "train")
    shutil.copy(other / "train-0001.tar", root / "train-0001.tar")
    shutil.copy(other / "validation-0000.tar", root / "train-0002.tar")
    capsys.readouterr()
    found = open_records("webdataset", root, "train")
    assert "reading 2 of 3 shards" in capsys.readouterr().err
    monkeypatch.setattr(shards, "IN_MEMORY", 2**30)
    assert_same(found, open_records("webdataset", root, "train"))
    with pytest.raises(OptimaError, match="made anew"):
        _ = before[len(before) - 1]


def test_a_damaged_index_gives_no_other_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    root = make_webdataset(tmp_path / "root", 8)
    expected = [record.texts for record in open_records("webdataset", root, "train").items]
    monkeypatch.setattr(shards, "IN_MEMORY", 0)
    open_records("webdataset", root, "train", index=tmp_path / "index")
    whole = {path: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    draws = random.Random(seed)
    for number in range(60):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for path, data in whole.items():
            damaged = bytearray(data)
            for _ in range(draws.randrange(1, 3)):
                damaged[draws.randrange(len(damaged))] ^= 1 << draws.randrange(8)
            cut = draws.choice([len(damaged), len(damaged), draws.randrange(len(damaged))])
            (folder / path.name).write_bytes(damaged[:cut])
        said = ""
        try:
            texts = [record.texts for record in open_records("webdataset", root, "train", index=folder).items]
        except OptimaError as error:
            said = str(error)
        assert "damaged" in said or texts == expected


def test_any_store_that_fsspec_knows_is_read(tars: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    store = MemoryFileSystem()
    for path in tars.iterdir():
        store.pipe(f"/shelf/{path.name}", path.read_bytes())
    expected = open_records("webdataset", tars, "validation")
    assert_same(open_records("webdataset", "memory://shelf", "validation"), expected)
    store.rm("/shelf", recursive=True)
    with pytest.raises(OptimaError, match="lacks the test shards"):
        open_records("webdataset", "memory://shelf", "test")


@pytest.mark.parametrize(
    "pattern", ["s-{000..012}.tar", "{a,b}/x{8..11}{,y}.tar", "{0..1}{00..02}{p,q,r}.tar", "a.tar"]
)
def test_braces_are_expanded_as_by_the_shell(pattern: str) -> None:
    shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
    assert find_shards.expand(pattern) == shell.stdout.split()


@pytest.mark.parametrize(
    "pattern", ["{9..1}.tar", "{0..99999999}.tar", "{0..99}{0..99}{0..9}.tar", "{a}.tar", "{}.tar"]
)
def test_braces_without_end_or_sense_are_refused(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_shards, "MAX_SHARDS", 9999)
    with pytest.raises(OptimaError):
        find_shards.expand(pattern)


def test_patterns_name_tars_of_a_folder(tars: Path) -> None:
    whole = open_records("webdataset", tars, "train")
    assert_same(open_records("webdataset", tars, "train-{0000..0001}.tar"), whole)
    assert_same(open_records("webdataset", tars, "train-*.tar"), whole)
    below = open_records("webdataset", tars.parent, "tars/train-000?.tar")
    assert [record.id for record in below.items] == [f"tars/{record.id}" for record in whole.items]
    with pytest.raises(OptimaError, match=r"there is no shard .*train-0002\.tar"):
        open_records("webdataset", tars, "train-{0001..0002}.tar")
    with pytest.raises(OptimaError, match="coco has no split"):
        open_records("coco", tars, "train-*.tar")


def test_a_folder_whose_name_is_no_address_is_one(tmp_path: Path) -> None:
    with pytest.raises(OptimaError, match="is not a folder"):
        open_records("webdataset", "s3:/bucket", "train")
    with pytest.raises(Unusable, match="there is no"):
        ImageSource("memory://nothing/here.jpg", 0, 10).read()


def test_a_packed_place_that_is_none_costs_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"id": str(number), "place": place, "texts": ["a cat"], "target": -1, "answers": []}
        for number, place in enumerate((0, 2**70, -1))
    ]
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, data in (("a.jpg", encoded(scene())), ("a.json", json.dumps(rows).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    size = (tmp_path / "train-0.tar").stat().st_size
    listed = {"optima_shards": 1, "name": "folder", "task": "captioning", "classes": [], "left_out": {}}
    listed["shards"] = [{"file": "train-0.tar", "bytes": size}]
    (tmp_path / "train.json").write_text(json.dumps(listed))
    for in_memory in (2**30, 0):
        monkeypatch.setattr(shards, "IN_MEMORY", in_memory)
        records = open_records("folder", tmp_path, "train", max_rejected=1)
        assert [record.id for record in records.items] == ["0"]
        assert [lost.kind for lost in records.rejected] == ["row-type"] * 2
