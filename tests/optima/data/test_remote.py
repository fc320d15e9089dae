"""Shards at an address: as those of a folder, through broken connections, and named where they do not come whole."""

import itertools
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from miniatures import make_nlvr2, make_vqav2, make_webdataset
from same_records import SMALL, assert_equal_batches, assert_same, batches_of, loader_of
from servers import Server, serving

from optima.commands.prepare import prepare
from optima.data import remote, shards
from optima.data.config import DataName, LoaderConfig, PrepareConfig
from optima.data.engine import ImageReader, Job
from optima.data.order import Order
from optima.data.record import RejectionLog
from optima.data.records import open_records
from optima.data.shard_index import IndexedRecords
from optima_core.errors import OptimaError

pytest.importorskip("aiohttp", reason="reading web servers needs the extra cloud")


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
        with loader_of(records, share=0.5, log=RejectionLog(report)) as loader:
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
