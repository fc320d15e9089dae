"""Loaders: every record once an epoch on any number of ranks, the same after a resume, the same from both engines."""

import json
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from miniatures import make_coco, make_nlvr2, make_snli_ve, save_image
from PIL import Image

from optima.data.config import LoaderConfig, TransformConfig
from optima.data.loader import Loader, make_loader
from optima.data.order import Order, once
from optima.data.record import ImageSource, Record, Records, RejectionLog
from optima.data.records import open_records
from optima_core.errors import OptimaError

SMALL = TransformConfig(image_size=32)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return open_records("coco", make_coco(tmp_path_factory.mktemp("coco"), 13), "train")


@pytest.fixture(scope="module")
def nlvr2(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return open_records("nlvr2", make_nlvr2(tmp_path_factory.mktemp("nlvr2"), 8), "train")


@pytest.fixture(params=["torch", "dali"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is optional")
    return str(request.param)


def loader_of(records: Records, engine: str = "torch", *, workers: int = 0, seed: int = 5, **options: object) -> Loader:
    config = LoaderConfig(engine=engine, workers=workers, transform=SMALL, max_rejected=0.5)  # type: ignore[arg-type]
    return make_loader(records, config, batch_size=4, seed=seed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_torchs_random_numbers_to_the_training(coco: Records, workers: int) -> None:
    before = torch.get_rng_state()
    with loader_of(coco, workers=workers) as loader:
        loader.load(3)
        loader.load(4)
        list(loader.once())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("records", "batch_size"), [(13, 4), (12, 4), (5, 8), (1, 3)])
def test_every_record_comes_once_an_epoch_on_any_number_of_ranks(
    world_size: int, records: int, batch_size: int, seed: int
) -> None:
    steps = 3 * records
    stream = [
        place
        for step in range(steps)
        for rank in range(world_size)
        for place in Order(records, batch_size, seed, rank, world_size).step(step)
    ]
    for epoch in range(len(stream) // records):
        passing = stream[epoch * records : (epoch + 1) * records]
        assert {place.epoch for place in passing} == {epoch}
        assert sorted(place.record for place in passing) == list(range(records))


def test_epochs_and_seeds_differ_in_order(seed: int) -> None:
    def epoch(number: int, of: int) -> list[int]:
        return [place.record for place in Order(50, 50, of).step(number)]

    assert epoch(0, seed) != epoch(1, seed)
    assert epoch(0, seed) != epoch(0, seed + 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_evaluation_sees_every_record_once_on_any_number_of_ranks(world_size: int) -> None:
    seen = [place.record for rank in range(world_size) for batch in once(13, 4, rank, world_size) for place in batch]
    assert sorted(seen) == list(range(13))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loaders_of_all_ranks_together_give_every_record_once(coco: Records, engine: str, world_size: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    places: Counter[tuple[int, int]] = Counter()
    for rank in range(world_size):
        with loader_of(coco, engine, rank=rank, world_size=world_size) as loader:
            for step in range(7):
                batch = loader.load(step)
                seen.update(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True))
                places.update(Order(13, 4, 5, rank, world_size).step(step))
    assert seen == places
    assert {record for epoch, record in seen if epoch == 0} == set(range(13))
    assert max(seen.values()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_a_step_gives_what_an_uninterrupted_run_gives(coco: Records, engine: str, workers: int) -> None:
    with loader_of(coco, engine, workers=workers) as loader:
        whole = [loader.load(step) for step in range(8)]
    with loader_of(coco, engine, workers=workers) as loader:
        loader.load(0)
        rest = [loader.load(step) for step in range(5, 8)]
        again = loader.load(2)
    for found, expected in zip([*rest, again], [*whole[5:], whole[2]], strict=True):
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got, wanted)


RUN = """
import sys
from pathlib import Path
from optima.data.config import LoaderConfig, TransformConfig
from optima.data.loader import make_loader
from optima.data.records import open_records
root, engine = sys.argv[1:]
config = LoaderConfig(engine=engine, workers=1, transform=TransformConfig(image_size=32))
loader = make_loader(open_records("coco", Path(root), "train"), config, batch_size=4, seed=5)
for step in range(10**6):
    batch = loader.load(step)
    print([batch.epochs.tolist(), batch.indices.tolist(), int(batch.images.sum())], flush=True)
"""


def test_after_kill_9_within_an_epoch_the_same_records_are_left_in_the_same_order(tmp_path: Path, engine: str) -> None:
    records = open_records("coco", make_coco(tmp_path, 13), "train")

    def seen_by(loader: Loader, steps: range) -> list[object]:
        batches = [loader.load(step) for step in steps]
        return [[batch.epochs.tolist(), batch.indices.tolist(), int(batch.images.sum())] for batch in batches]

    with loader_of(records, engine, workers=1) as loader:
        expected = seen_by(loader, range(9))
    command = [sys.executable, "-c", RUN, str(tmp_path), engine]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        seen: list[object] = [json.loads(killed.stdout.readline()) for _ in range(2)]
        killed.send_signal(signal.SIGKILL)
    with loader_of(records, engine, workers=1) as loader:
        seen += seen_by(loader, range(2, 9))
    assert seen == expected


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_both_engines_see_the_same_in_an_evaluation(coco: Records, nlvr2: Records, fit: str) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is optional")
    transform = TransformConfig(image_size=48, fit=fit)  # type: ignore[arg-type]
    for records in (coco, nlvr2):
        passes = []
        for engine in ("torch", "dali"):
            config = LoaderConfig(engine=engine, workers=1, transform=transform)  # type: ignore[arg-type]
            with make_loader(records, config, batch_size=5) as loader:
                batches = list(loader.once())
            passes.append(torch.cat([batch.images for batch in batches]))
            assert [len(batch.indices) for batch in batches] == [5] * (len(records) // 5) + [len(records) % 5]
            assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(len(records)))
        difference = (passes[0].float() - passes[1].float()).abs()
        assert difference.mean() < 0.5
        assert difference.max() < 12


def test_dali_resamples_as_torch_does(coco: Records) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is optional")
    from optima.data.dali_engine import DaliEngine
    from optima.data.engine import ImageReader, Job

    config = LoaderConfig(workers=1, transform=SMALL)
    reader = ImageReader(coco, SMALL, 0)
    jobs = [Job(Order(13, 4).step(step), training=True) for step in range(3)]
    by = [DaliEngine(reader, config, torch.device("cpu"), resample_in_dali=whole) for whole in (True, False)]
    for (ours, _), (theirs, _) in zip(by[0].run(iter(jobs)), by[1].run(iter(jobs)), strict=True):
        difference = (ours.images.float() - theirs.images.float()).abs()
        assert difference.mean() < 0.5
        assert difference.max() < 12


def test_both_engines_train_on_the_same_windows(coco: Records) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is optional")
    with loader_of(coco) as ours, loader_of(coco, "dali") as theirs:
        for step in range(4):
            first, second = ours.load(step), theirs.load(step)
            assert torch.equal(first.indices, second.indices)
            assert (first.images.float() - second.images.float()).abs().mean() < 1


def test_the_evaluation_takes_the_central_square(tmp_path: Path) -> None:
    """Against Pillow: the central square, resampled with the same filter."""
    from optima.data.pictograms.stream import Pictograms

    path = tmp_path / "wide.png"
    save_image(path, Pictograms("train").example("captioning", 0).scenes[0], (150, 90))
    records = Records("folder", "test", "captioning", [Record("wide", (ImageSource(str(path)),), ("a",))])
    with loader_of(records, training=False) as loader:
        square = next(loader.once()).images[0, 0]
    image = Image.open(path).crop((30, 0, 120, 90)).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
    assert (square.float() - expected.float()).abs().max() <= 2


def test_training_crops_at_random_and_mirrors_only_where_sides_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "sides.png"
    image = Image.new("RGB", (64, 64), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 32, 64))
    image.save(path)
    config = LoaderConfig(engine="torch", workers=0, transform=TransformConfig(image_size=16, least_area=0.9))

    def mirrored(task: str, text: str) -> set[bool]:
        sources = (ImageSource(str(path)),) * (2 if task == "nlvr2" else 1)
        items = [Record(str(number), sources, (text,), 0) for number in range(40)]
        records = Records("made", "train", task, items)  # type: ignore[arg-type]
        with make_loader(records, config, batch_size=40) as loader:
            images = loader.load(0).images.flatten(0, 1)
        assert len({bytes(image.numpy().tobytes()) for image in images}) > 10
        return {bool(image[0, 8, 0] < 128) for image in images}

    assert mirrored("captioning", "red beside blue") == {True, False}
    assert mirrored("snli_ve", "there is red") == {True, False}
    assert mirrored("captioning", "red Left of blue") == {False}
    assert mirrored("vqa", "which colour is first?") == {False}
    assert mirrored("nlvr2", "one is red") == {False}


def test_an_unusable_image_is_reported_once_and_not_replaced(tmp_path: Path, engine: str) -> None:
    root = make_snli_ve(tmp_path / "data")
    records = open_records("snli_ve", root, "train")
    broken = Path(records[2].images[0].path)
    broken.write_bytes(broken.read_bytes()[:-40])
    report = tmp_path / "rejected.jsonl"
    with loader_of(records, engine, log=RejectionLog(report)) as loader:
        batches = [loader.load(step) for step in range(6)]
        seen = Counter(
            place for batch in batches for place in zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)
        )
        evaluated = torch.cat([batch.indices for batch in loader.once()])
    whole = Counter(place for step in range(6) for place in Order(11, 4, 5).step(step))
    assert seen == {place: 1 for place in whole if place[1] != 2}
    assert evaluated.tolist() == [index for index in range(11) if index != 2]
    line = report.read_text()
    assert line.count("\n") == 1
    assert records[2].id in line
    assert "image-truncated" in line


def test_a_run_ends_when_too_many_images_are_unusable(tmp_path: Path, engine: str) -> None:
    records = open_records("snli_ve", make_snli_ve(tmp_path), "train")
    for record in records.items[:6]:
        Path(record.images[0].path).write_bytes(b"not found")
    loader = loader_of(records, engine)
    with pytest.raises(OptimaError, match=r"6 of 11 records of snli_ve train .*rejected"):
        [loader.load(step) for step in range(6)]
    loader.close()


def test_dali_survives_what_only_its_own_decoder_notices(tmp_path: Path) -> None:
    """The torch engine makes the batches that DALI could not, and says what was wrong with them."""
    pytest.importorskip("nvidia.dali", reason="DALI is optional")
    records = open_records("snli_ve", make_snli_ve(tmp_path), "train")
    path = Path(records[4].images[0].path)
    data = bytearray(path.read_bytes())
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16  # a Huffman table that cannot be
    path.write_bytes(data)
    with loader_of(records, "dali") as loader:
        batches = list(loader.once())
    assert torch.cat([batch.indices for batch in batches]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert loader.rejected[4].kind == "image-corrupt"


def test_dali_that_is_missing_is_named(coco: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "optima.data.dali_engine", raising=False)
    with pytest.raises(OptimaError, match="engine dali needs the package nvidia-dali"):
        loader_of(coco, "dali")


def test_dali_copies_every_batch_on_one_stream(coco: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator keeps a pool of memory a stream: a stream a batch would keep dozens of batches."""
    for name in ("nvidia", "nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.delitem(sys.modules, "optima.data.dali_engine", raising=False)
    from optima.data.dali_engine import DaliEngine

    made = MagicMock()
    monkeypatch.setattr(torch.cuda, "Stream", made)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    engine = DaliEngine(MagicMock(), LoaderConfig(), torch.device("cpu"), resample_in_dali=True)
    for _ in range(3):
        engine._from_gpu(None, MagicMock(ready=[]), (2, 1, 3, 4, 4))
    assert made.call_count == 1
    assert made.return_value.synchronize.call_count == 3
    monkeypatch.delitem(sys.modules, "optima.data.dali_engine")
