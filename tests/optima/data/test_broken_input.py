"""What comes with real data: every unusable thing is named with its kind, every odd one is read rightly."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import BROKEN_IMAGES, BROKEN_LINES, BROKEN_TEXTS, ODD_IMAGES, encoded, make_tar, scene
from miniatures import make_coco, make_nlvr2, make_snli_ve, make_vqav2, write_json
from PIL import Image, ImageOps

from optima.commands.prepare import prepare
from optima.data import images
from optima.data.config import LoaderConfig, PrepareConfig, TransformConfig
from optima.data.images import decode, inspect
from optima.data.loader import make_loader
from optima.data.record import RejectionLog
from optima.data.records import open_records
from optima_core.errors import OptimaError

# libjpeg only warns of a hole in a JPEG; Pillow and DALI do not pass the warning on.
UNNOTICED_WITHOUT_SIMPLEJPEG = {"jpeg-hole"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything, and ten good images."""
    root = tmp_path_factory.mktemp("corpus")
    lines = []
    for number in range(10):
        (root / f"good-{number}.jpg").write_bytes(encoded(scene()))
        lines.append(json.dumps({"file_name": f"good-{number}.jpg", "text": "a cat"}))
    for name, (_, make) in broken_images().items():
        make(root / f"{name}.jpg")
        lines.append(json.dumps({"file_name": f"{name}.jpg", "text": name}))
    for name, (_, data) in ODD_IMAGES.items():
        (root / name).write_bytes(data())
        lines.append(json.dumps({"file_name": name, "text": name}))
    for name, (_, text) in BROKEN_TEXTS.items():
        (root / f"text-{name}.jpg").write_bytes(encoded(scene()))
        lines.append(json.dumps({"file_name": f"text-{name}.jpg", "text": text}))
    raw = [line.encode() for line in lines] + [line for _, line in BROKEN_LINES.values()]
    (root / "train.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    return root


def broken_images() -> dict[str, tuple[str, Callable[[Path], None]]]:
    unnoticed = UNNOTICED_WITHOUT_SIMPLEJPEG if images.simplejpeg is None else set()
    return {name: found for name, found in BROKEN_IMAGES.items() if name not in unnoticed}


def test_every_broken_thing_is_named_with_its_kind_and_the_rest_is_kept(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PrepareConfig("folder", corpus, ["train"], tmp_path, pack=False, max_rejected=0.9, workers=1)
    (report,) = prepare(config)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    kinds = {row["id"]: row["kind"] for row in rejected}
    expected = {f"{name}.jpg": kind for name, (kind, _) in broken_images().items()}
    expected |= {f"text-{name}.jpg": kind for name, (kind, _) in BROKEN_TEXTS.items()}
    assert {name: kinds.get(name) for name in expected} == expected
    of_lines = Counter(kind for kind, _ in BROKEN_LINES.values())
    assert Counter(row["kind"] for row in rejected) == Counter(expected.values()) + of_lines
    assert len(rejected) == len(broken_images()) + len(BROKEN_TEXTS) + len(BROKEN_LINES) >= 40
    assert all(row["reason"] and row["where"] for row in rejected)
    kept = {record.id for record in report.records.items}
    assert kept == {f"good-{number}.jpg" for number in range(10)} | set(ODD_IMAGES)

    converted = [json.loads(line) for line in (tmp_path / "converted.jsonl").read_text().splitlines()]
    found = {Path(row["where"]).name: set(row["traits"]) for row in converted}
    assert found == {name: traits for name, (traits, _) in ODD_IMAGES.items() if traits}
    printed = capsys.readouterr().out
    assert f"image-unrecognised {Counter(expected.values())['image-unrecognised']}" in printed


def test_too_many_broken_things_stop_the_run_after_they_are_listed(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(OptimaError, match="items cannot be used"):
        prepare(PrepareConfig("folder", corpus, ["train"], tmp_path, max_rejected=0.05, workers=1))
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) >= 40
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("engine", ["torch", "dali"])
def test_loading_what_was_not_prepared_survives_it_too(corpus: Path, tmp_path: Path, engine: str) -> None:
    if engine == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is optional")
    records = open_records("folder", corpus, "train", max_rejected=1)
    config = LoaderConfig(engine, 0, max_rejected=1, transform=TransformConfig(image_size=32))  # type: ignore[arg-type]
    report = tmp_path / "rejected.jsonl"
    with make_loader(records, config, batch_size=8, log=RejectionLog(report)) as loader:
        loaded = torch.cat([batch.indices for batch in loader.once()])
    rejected = {json.loads(line)["id"]: json.loads(line)["kind"] for line in report.read_text().splitlines()}
    expected = {f"{name}.jpg": kind for name, (kind, _) in broken_images().items() if name != "missing"}
    if engine == "dali":
        expected = {name: kind for name, kind in expected.items() if name[:-4] not in UNNOTICED_WITHOUT_SIMPLEJPEG}
    assert rejected == expected
    assert {records[index].id for index in loaded.tolist()} == {record.id for record in records.items} - set(expected)


def _reference(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images_look_as_pillow_shows_them(name: str) -> None:
    data = ODD_IMAGES[name][1]()
    header = inspect(data)
    pixels = decode(data, header)
    expected = np.asarray(scene("L").convert("RGB")).astype(int) if name == "grey-16-bit.png" else _reference(data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape == (header.height, header.width, 3)
    assert np.abs(pixels - expected).mean() < 1


def test_without_simplejpeg_pillow_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(scene(size=(150, 100)))
    fast = decode(data, inspect(data)).astype(int)
    monkeypatch.setattr(images, "simplejpeg", None)
    header = inspect(data)
    assert not header.turbo
    assert np.abs(decode(data, header) - fast).mean() < 1
    with pytest.raises(images.Unusable, match="damaged"):
        decode(data[:-200], inspect(data[:-200]))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a \U0001f468\u200d\U0001f469\u200d\U0001f467 family", "a \U0001f468\u200d\U0001f469\u200d\U0001f467 family"),
        ("\u0642\u0637\u0629 \u0639\u0644\u0649 \u062d\u0635\u064a\u0631\u0629", None),
        ("\u05d7\u05ea\u05d5\u05dc", None),
        ("two\nlines\tand\x00more", "two lines and more"),
        ("cafe\u0301", "caf\u00e9"),
        ("  \u732b\u3000\u304c  ", "\u732b \u304c"),
    ],
)
def test_texts_of_all_scripts_are_kept_with_even_spaces(text: str, kept: str | None, tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(encoded(scene()))
    (tmp_path / "train.jsonl").write_text(json.dumps({"file_name": "good.jpg", "text": text}))
    assert open_records("folder", tmp_path, "train")[0].text == (kept or text)


def _kinds(name: str, root: Path, split: str = "train") -> list[str]:
    records = open_records(name, root, split, max_rejected=0.9)  # type: ignore[arg-type]
    return [rejection.kind for rejection in records.rejected]


def _edit(path: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def test_broken_rows_of_coco_are_named(tmp_path: Path) -> None:
    path = make_coco(tmp_path, 6) / "annotations/captions_train2017.json"

    def change(content: dict) -> None:  # type: ignore[type-arg]
        images, annotations = content["images"], content["annotations"]
        images += [images[0], {"id": 77}, {"id": True, "file_name": "x.jpg"}, "no object"]
        images.append({"id": 78, "file_name": "../up.jpg"})
        annotations += [annotations[0] | {"caption": "again"}, {"id": 900, "image_id": 999, "caption": "whose?"}]
        annotations += [{"id": 901, "image_id": 0}, {"id": 902, "image_id": 0, "caption": ""}, None]

    _edit(path, change)
    of_images = ["duplicate-id", "field-missing", "id-type", "row-type", "unsafe-name"]
    of_captions = ["duplicate-id", "image-unknown", "field-missing", "text-empty", "row-type"]
    assert sorted(_kinds("coco", tmp_path)) == sorted(of_images + of_captions)


def test_broken_rows_of_vqav2_are_named(tmp_path: Path) -> None:
    make_vqav2(tmp_path)

    def change_questions(content: dict) -> None:  # type: ignore[type-arg]
        questions = content["questions"]
        questions += [questions[0], questions[0] | {"question_id": 12345}, questions[1] | {"question_id": None}]
        questions[2]["image_id"] = "3"
        questions[3]["question"] = "  "

    def change_answers(content: dict) -> None:  # type: ignore[type-arg]
        content["annotations"] += [content["annotations"][0], {"question_id": 5, "answers": []}]

    _edit(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", change_questions)
    _edit(tmp_path / "v2_mscoco_train2014_annotations.json", change_answers)
    assert sorted(_kinds("vqav2", tmp_path)) == sorted(
        ["duplicate-id", "answers-missing", "id-type", "id-type", "text-empty", "duplicate-id", "answers-missing"]
    )


def test_broken_rows_of_nlvr2_and_snli_ve_are_named(tmp_path: Path) -> None:
    lines = make_nlvr2(tmp_path / "nlvr2") / "data/train.json"
    rows = lines.read_text().splitlines()
    rows[0] = rows[0].replace('"label": "', '"label": "Perhaps')
    rows[1] = rows[1].replace('"identifier": "train-0-1-0"', '"identifier": "train"')
    lines.write_text("\n".join([*rows, rows[2], "42"]))
    (tmp_path / "nlvr2/images/train/0/train-1-1-img1.png").unlink()
    assert sorted(_kinds("nlvr2", tmp_path / "nlvr2")) == [
        "duplicate-id",
        "id-type",
        "image-missing",
        "label-unknown",
        "row-type",
    ]

    lines = make_snli_ve(tmp_path / "ve") / "snli_ve_train.jsonl"
    lines.write_text(lines.read_text().replace('"gold_label": "neutral"', '"gold_label": "maybe"'))
    neutral = lines.read_text().count('"maybe"')
    assert _kinds("snli_ve", tmp_path / "ve") == ["label-unknown"] * neutral


def test_a_tar_is_not_trusted(tmp_path: Path) -> None:
    expected = make_tar(tmp_path / "train-0.tar")
    records = open_records("webdataset", tmp_path, "train", max_rejected=0.9)
    assert {rejection.where.split("/", 1)[1]: rejection.kind for rejection in records.rejected} == expected
    assert {record.id.split("/")[1] for record in records.items} == {"good", "twice", "last"}
    assert records[0].text == "ein K\u00e4tzchen"
    assert inspect(records[0].images[0].read()).format == "JPEG"


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, data in {
            "a.jpg": encoded(scene()),
            "a.txt": b"\xef\xbb\xbfa cat\r\n",
            "b.jpg": encoded(scene()),
            "b.json": b'\xef\xbb\xbf{"caption": "a dog"}',
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [record.text for record in open_records("webdataset", tmp_path, "train").items] == ["a cat", "a dog"]


@pytest.mark.parametrize(("cut", "kind"), [(-5000, "shard-truncated"), (-12000, "shard-truncated"), (0, None)])
def test_a_tar_that_ends_early_is_named(cut: int, kind: str | None, tmp_path: Path) -> None:
    expected = make_tar(tmp_path / "train-0.tar")
    data = (tmp_path / "train-0.tar").read_bytes().rstrip(b"\0")
    (tmp_path / "train-0.tar").write_bytes(data[:cut] if cut else data + bytes(1024))
    records = open_records("webdataset", tmp_path, "train", max_rejected=0.99)
    assert [rejection.kind for rejection in records.rejected].count("shard-truncated") == (kind is not None)
    assert len(records.rejected) >= (1 if cut else len(expected))


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    make_tar(tmp_path / "train-0.tar")
    (tmp_path / "train-1.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "train-2.tar").write_bytes(b"")
    records = open_records("webdataset", tmp_path, "train", max_rejected=0.99)
    kinds = {rejection.where: rejection.kind for rejection in records.rejected}
    assert kinds["train-1.tar"] == kinds["train-2.tar"] == "shard-broken"
