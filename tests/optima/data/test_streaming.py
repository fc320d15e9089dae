"""Shards at an address, and with an index: as those in memory, through broken connections, and never other ones."""

import io
import itertools
import json
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from broken import encoded, scene
from miniatures import make_nlvr2, make_vqav2, make_webdataset
from servers import Server, serving

from optima.commands.prepare import prepare
from optima.data import find_shards, remote, shards
from optima.data.config import DataName, LoaderConfig, PrepareConfig, TransformConfig
from optima.data.engine import ImageReader, Job
from optima.data.loader import Loader, make_loader
from optima.data.order import Order
from optima.data.record import ImageSource, Records, RejectionLog, Unusable
from optima.data.records import open_records
from optima.data.shard_index import IndexedRecords
from optima_core.errors import OptimaError

pytest.importorskip("aiohttp", reason="reading web servers needs the extra cloud")
SMALL = TransformConfig(image_size=32)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tries follow at once, and indices go into the test's own folder."""
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_webdataset(tmp_path_factory.mktemp("served") / "tars", 20)


@pytest.fixture
def server(tars: Path) -> Iterator[Server]:
    with serving(tars.parent) as found:
        yield found


PATTERN = "train-{0000..0001}.tar"


def loader_of(records: Records, *, workers: int = 0, share: float = 0.01, **options: object) -> Loader:
    config = LoaderConfig(engine="torch", workers=workers, transform=SMALL, max_rejected=share)
    return make_loader(records, config, batch_size=4, seed=5, **options)  # type: ignore[arg-type]


def batches_of(records: Records, steps: int = 12, **options: object) -> list[list[torch.Tensor]]:
    with loader_of(records, **options) as loader:  # type: ignore[arg-type]
        return [list(loader.load(step)) for step in range(steps)]


def assert_same(found: Records, expected: Records) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found.items, expected.items, strict=True):
        assert (ours.id, ours.texts, ours.target, ours.answers) == (
            theirs.id, theirs.texts, theirs.target, theirs.answers,
        )  # fmt: skip
        assert [source.read() for source in ours.images] == [source.read() for source in theirs.images]
    assert (found.task, found.classes, found.left_out) == (expected.task, expected.classes, expected.left_out)
    assert [vars(lost) for lost in found.rejected] == [vars(lost) for lost in expected.rejected]


def assert_equal_batches(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_tars_on_a_web_server_give_the_batches_of_those_in_a_folder(server: Server, tars: Path, workers: int) -> None:
    expected = open_records("webdataset", tars, "train")
    found = open_records("webdataset", f"{server.address}/tars", PATTERN)
    assert_same(found, expected)
    server.drops = 7
    assert_equal_batches(batches_of(found, workers=workers), batches_of(expected, workers=workers))
    assert server.drops == 0


def test_dropped_connections_are_asked_again_while_shards_are_first_read(server: Server, tars: Path) -> None:
    server.drops = 3
    assert_same(
        open_records("webdataset", f"{server.address}/tars", PATTERN), open_records("webdataset", tars, "train")
    )
    assert server.drops == 0


def test_a_second_start_asks_nobody_and_reads_each_image_by_its_range(server: Server) -> None:
    root = f"{server.address}/tars"
    open_records("webdataset", root, PATTERN)
    server.asked.clear()
    records = open_records("webdataset", root, PATTERN)
    texts = list(records.texts(10**6))
    assert len(texts) == 20
    assert server.asked == []
    with loader_of(records) as loader:
        batch = loader.load(10**6)
    sources = [records[index].images[0] for index in batch.indices.tolist()]
    expected = [f"bytes={source.offset}-{source.offset + source.size - 1}" for source in sources]
    assert sorted(asked for _, asked in server.asked) == sorted(expected)


@pytest.mark.parametrize("name", ["webdataset", "vqav2", "nlvr2"])
def test_packed_shards_are_read_by_their_list_from_a_web_server(name: DataName, tmp_path: Path) -> None:
    makers = {"webdataset": make_webdataset, "vqav2": make_vqav2, "nlvr2": make_nlvr2}
    root, out = makers[name](tmp_path / "root", 14), tmp_path / "out"
    prepare(PrepareConfig(name, root, ["train"], out, workers=1))
    with serving(tmp_path) as server:
        found, expected = (open_records(name, place, "train") for place in (f"{server.address}/out", out))
        assert isinstance(found.items, IndexedRecords)
        assert_same(found, expected)
        assert_equal_batches(batches_of(found, 5), batches_of(expected, 5))
        (out / "train.json").write_text((out / "train.json").read_text().replace('"bytes": ', '"bytes": 1'))
        with pytest.raises(OptimaError, match="copy it again"):
            open_records(name, f"{server.address}/out", "train", index=tmp_path / "other")


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


@pytest.mark.parametrize("fault", ["truncated", "dropped", "changed", "gone"])
def test_an_image_that_does_not_come_whole_is_named_counted_and_skipped(fault: str, tars: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tars, root / "tars")
    with serving(root) as server:
        records = open_records("webdataset", f"{server.address}/tars", PATTERN)
        source = records[19].images[0]
        path = root / "tars/train-0001.tar"
        if fault == "truncated":
            server.lengths["tars/train-0001.tar"] = source.offset + source.size // 2
        elif fault == "dropped":
            server.broken.add(("tars/train-0001.tar", source.offset))
        elif fault == "changed":
            data = bytearray(path.read_bytes())
            data[source.offset + source.size // 2] ^= 1
            path.write_bytes(data)
        else:
            path.unlink()
        report = tmp_path / "rejected.jsonl"
        lost = 10 if fault == "gone" else 1
        with loader_of(records, share=0.5, report=RejectionLog(report)) as loader:
            seen = torch.cat([batch.indices for batch in loader.once()])
        assert seen.tolist() == list(range(20 - lost))
        rows = [json.loads(line) for line in report.read_text().splitlines()]
        kinds = {"truncated": "truncated", "dropped": "unreachable", "changed": "changed", "gone": "missing"}
        assert {row["kind"] for row in rows} == {f"image-{kinds[fault]}"}
        assert rows[-1]["id"] == "train-0001/000019"
        assert rows[-1]["where"] == f"{server.address}/tars/train-0001.tar at byte {source.offset}"
        asked = [byte for name, byte in server.asked if byte.startswith(f"bytes={source.offset}-")]
        assert len(asked) == (1 if fault == "gone" else 5)
        with loader_of(records, share=0.01) as loader, pytest.raises(OptimaError, match="unusable images"):
            list(loader.once())


def test_a_server_that_is_down_is_one_line_and_leaves_no_empty_index(server: Server, tmp_path: Path) -> None:
    root = f"{server.address}/tars"
    for status, complaint in ((503, "5 tries; the last: OSError: the server answers 503"), (403, "may not be read")):
        server.status = status
        with pytest.raises(OptimaError, match=complaint):
            open_records("webdataset", root, PATTERN)
        assert len(server.asked) <= 2 * 5
        server.asked.clear()
    server.status = 0
    with pytest.raises(OptimaError, match=r"there is no .*train-0002\.tar"):
        open_records("webdataset", root, "train-{0000..0002}.tar")
    server.broken.add(("tars/train-0001.tar", 0))
    with pytest.raises(OptimaError, match=r"train-0001\.tar cannot be read in 5 tries"):
        open_records("webdataset", root, PATTERN, index=tmp_path / "other")
    server.broken.clear()
    assert len(open_records("webdataset", root, PATTERN)) == 20


def test_a_server_that_sends_other_than_was_asked_for_fills_no_memory(server: Server) -> None:
    root = f"{server.address}/tars"
    server.floods = True
    with pytest.raises(OptimaError, match=r"cannot be read in 5 tries.*more than was asked for"):
        open_records("webdataset", root, PATTERN)
    assert server.sent < 5 * 2**26
    server.floods, server.ignores_ranges = False, True
    with pytest.raises(OptimaError, match="ignores ranges of bytes"):
        open_records("webdataset", root, PATTERN)


def test_a_tar_that_is_said_to_be_endless_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_REMOTE_SHARD_BYTES", 2000)
    with pytest.raises(OptimaError, match=r"train-000.\.tar has \d+ bytes; 2000 are the most at an address"):
        open_records("webdataset", f"{server.address}/tars", PATTERN)


def test_a_pattern_is_checked_but_not_packed(server: Server, tmp_path: Path) -> None:
    config = PrepareConfig("webdataset", f"{server.address}/tars", [PATTERN], tmp_path / "out", pack=False, workers=1)
    (report,) = prepare(config)
    assert (report.images, report.records.rejected) == (20, ())
    with pytest.raises(OptimaError, match="a pattern is none"):
        prepare(replace(config, pack=True))


def test_shards_of_a_web_server_must_be_named(server: Server) -> None:
    root = f"{server.address}/tars"
    for split in ("train", "train-*.tar"):
        with pytest.raises(OptimaError, match="a web server lists no files"):
            open_records("webdataset", root, split)
    with pytest.raises(OptimaError, match=r"no .*train\.json: at an address, coco is read from what `prepare` packed"):
        open_records("coco", root, "train")
    with pytest.raises(OptimaError, match=r"nosuch://.* is no address that can be read"):
        open_records("webdataset", "nosuch://a", PATTERN)


def test_an_object_store_is_listed_and_read(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="reading object stores needs the extra cloud")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serving(tars.parent) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        expected = open_records("webdataset", tars, "train")
        found = open_records("webdataset", "s3://tars", "train")
        assert_same(found, expected)
        assert found[0].images[0].path == "s3://tars/train-0000.tar"
        server.drops = 2
        assert_equal_batches(batches_of(found, 4), batches_of(expected, 4))
        assert_same(
            open_records("webdataset", "s3://tars", "train-*1.tar"), open_records("webdataset", tars, "train-*1.tar")
        )


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


def test_dali_is_fed_the_same_bytes(server: Server, tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia", "nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.delitem(sys.modules, "optima.data.dali_engine", raising=False)
    from optima.data.dali_engine import DaliEngine

    fed = []
    for records in (
        open_records("webdataset", f"{server.address}/tars", PATTERN),
        open_records("webdataset", tars, "train"),
    ):
        reader = ImageReader(records, SMALL, 3)
        engine = DaliEngine(reader, LoaderConfig(workers=1), torch.device("cpu"))
        batch = engine._read(Job(Order(20, 16).step(3), training=True))
        assert not batch.faults
        fed.append([(ready.row, ready.side, ready.data, ready.window) for ready in batch.ready])
    assert fed[0] == fed[1]
    assert len(fed[0]) == 16
    monkeypatch.delitem(sys.modules, "optima.data.dali_engine")


def test_a_reader_of_an_index_is_cheap_to_send_to_a_worker(server: Server) -> None:
    records = open_records("webdataset", f"{server.address}/tars", PATTERN)
    reader = ImageReader(records, SMALL, 0)
    sent = pickle.dumps(reader)
    assert len(sent) < 3000
    again = pickle.loads(sent)
    for place, side in itertools.product(Order(20, 20).step(0), (0,)):
        assert again.read(place, 0, side, training=True) == reader.read(place, 0, side, training=True)


def test_a_folder_whose_name_is_no_address_is_one(tmp_path: Path) -> None:
    with pytest.raises(OptimaError, match="is not a folder"):
        open_records("webdataset", "s3:/bucket", "train")
    with pytest.raises(Unusable, match="there is no"):
        ImageSource("memory://nothing/here.jpg", 0, 10).read()
