"""The official formats, as downloaded: what is read, and what is said of files that are missing."""

from pathlib import Path

import pytest
from miniatures import MAKERS, examples, make_coco, make_folder, make_nlvr2, make_snli_ve, make_vqav2, write_json

from optima.data.answers import normalise_answer
from optima.data.config import DataName
from optima.data.pictograms.captions import references
from optima.data.records import FORMATS, Records, open_records
from optima_core.errors import OptimaError


@pytest.mark.parametrize("name", MAKERS)
def test_every_split_of_every_format_is_read_without_loss(name: DataName, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    for split in set(FORMATS[name].splits) - {"test-dev", "test2"}:
        records = open_records(name, tmp_path, split, max_rejected=0)
        assert records.task == FORMATS[name].task
        assert not records.rejected
        assert len({record.id for record in records.items}) == len(records) > 0
        for record in records.items:
            assert len(record.images) == (2 if name == "nlvr2" else 1)
            assert all(len(source.read()) > 100 for source in record.images)


def test_coco_gives_a_image_all_its_captions_and_every_epoch_another_one(tmp_path: Path) -> None:
    records = open_records("coco", make_coco(tmp_path), "train")
    for index, (record, example) in enumerate(zip(records.items, examples("captioning", 12), strict=True)):
        texts = tuple(references(example.scenes[0])[: 1 + index % 3])
        assert record.id == str(index)
        assert record.texts == texts
        assert sorted(record.text_at(epoch) for epoch in range(len(texts))) == sorted(texts)


def test_coco_of_2014_is_found_by_its_names_and_test_has_no_references(tmp_path: Path) -> None:
    make_coco(tmp_path, 3, "2014")
    assert open_records("coco", tmp_path, "validation")[0].images[0].path.endswith("COCO_val2014_000000001000.jpg")
    assert open_records("coco", tmp_path, "test")[0].texts == ()


def test_coco_without_captions_takes_the_images_of_the_instances_file(tmp_path: Path) -> None:
    make_coco(tmp_path, 3)
    captions = tmp_path / "annotations/captions_val2017.json"
    captions.rename(captions.with_name("instances_val2017.json"))
    records = open_records("coco", tmp_path, "validation")
    assert [record.texts for record in records.items] == [()] * 3


def test_karpathy_trains_on_restval_too(tmp_path: Path) -> None:
    MAKERS["coco_karpathy"](tmp_path)
    assert [int(record.id) % 4 for record in open_records("coco_karpathy", tmp_path, "train").items] == [0, 1] * 3
    assert [int(record.id) % 4 for record in open_records("coco_karpathy", tmp_path, "test").items] == [3] * 3


def test_vqav2_classes_come_from_the_training_answers_whichever_split_is_read(tmp_path: Path) -> None:
    make_vqav2(tmp_path)
    train = open_records("vqav2", tmp_path, "train")
    held_out = open_records("vqav2", tmp_path, "validation")
    said = {normalise_answer(example.answer) for example in examples("vqa", 12)}
    assert set(train.classes) == said | {"unsure"}
    assert held_out.classes == train.classes
    for record, example in zip(train.items, examples("vqa", 12), strict=True):
        assert train.classes[record.target] == normalise_answer(example.answer)
        assert record.text == example.text
        assert record.answers == (example.answer,) * 7 + ("Unsure.",) * 3


def test_vqav2_trains_only_on_questions_with_an_answer_in_the_vocabulary(tmp_path: Path) -> None:
    make_vqav2(tmp_path)
    wanted = normalise_answer(examples("vqa", 12)[0].answer)
    train = open_records("vqav2", tmp_path, "train", classes=[wanted])
    held_out = open_records("vqav2", tmp_path, "validation", classes=[wanted])
    agreeing = sum(normalise_answer(example.answer) == wanted for example in examples("vqa", 12))
    assert len(train) == agreeing
    assert train.left_out == {"no answer in the vocabulary": 12 - agreeing}
    assert [record.target for record in held_out.items].count(0) == agreeing
    assert len(held_out) == 12


def test_nlvr2_keeps_left_and_right(tmp_path: Path) -> None:
    records = open_records("nlvr2", make_nlvr2(tmp_path), "train")
    for record, example in zip(records.items, examples("nlvr2", 12), strict=True):
        assert [source.path[-8:] for source in record.images] == ["img0.png", "img1.png"]
        assert record.target == example.target
        assert record.text == example.text


@pytest.mark.parametrize("spelling", ["Flickr30K_ID", "Flikr30kID"])
def test_snli_ve_leaves_out_pairs_without_a_gold_label(spelling: str, tmp_path: Path) -> None:
    make_snli_ve(tmp_path)
    lines = tmp_path / "snli_ve_train.jsonl"
    lines.write_text(lines.read_text().replace("Flickr30K_ID", spelling))
    records = open_records("snli_ve", tmp_path, "train")
    assert records.left_out == {"no gold label": 1}
    kept = [example for index, example in enumerate(examples("snli_ve", 12)) if index != 5]
    assert [records.classes[record.target] for record in records.items] == [example.answer for example in kept]


def test_a_folder_of_jsonl_reads_as_one_of_tsv(tmp_path: Path) -> None:
    tsv = open_records("folder", make_folder(tmp_path / "tsv"), "train")
    jsonl = open_records("folder", make_folder(tmp_path / "jsonl", ending="jsonl"), "train")
    assert [(r.id, r.texts) for r in tsv.items] == [(r.id, r.texts) for r in jsonl.items]
    for record, example in zip(tsv.items, examples("captioning", 12), strict=True):
        assert record.texts == tuple(dict.fromkeys(references(example.scenes[0])[:2]))


def test_one_file_of_captions_is_split_by_the_names_of_the_images(tmp_path: Path) -> None:
    make_folder(tmp_path, 40)
    lines = (tmp_path / "train.tsv").read_text()
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.tsv").unlink()
    (tmp_path / "captions.tsv").write_text(lines)
    sets = [{r.id for r in open_records("folder", tmp_path, split).items} for split in ("train", "validation", "test")]
    assert len(set.union(*sets)) == sum(len(found) for found in sets) == 40
    assert len(sets[0]) > 30


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptimaError, match=r"lacks the train annotations: annotations/captions_train2017.json or "):
        open_records("coco", tmp_path, "train")
    write_json(tmp_path / "annotations/captions_train2017.json", {"images": [], "annotations": []})
    with pytest.raises(OptimaError, match=r"lacks the images: folder train2017 or images/train2017"):
        open_records("coco", tmp_path, "train")
    (tmp_path / "train2017").mkdir()
    with pytest.raises(OptimaError, match="the split is empty"):
        open_records("coco", tmp_path, "train")
    with pytest.raises(OptimaError, match="no split 'holdout'; it has train, validation, test"):
        open_records("coco", tmp_path, "holdout")
    with pytest.raises(OptimaError, match="is not a folder"):
        open_records("coco", tmp_path / "nowhere", "train")


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    make_coco(tmp_path, 2)
    (tmp_path / "annotations/captions_train2017.json").write_text('{"images": [')
    with pytest.raises(OptimaError, match=r"captions_train2017\.json is not a JSON file"):
        open_records("coco", tmp_path, "train")


def test_a_run_goes_on_only_below_the_share_of_rejects(tmp_path: Path) -> None:
    make_coco(tmp_path, 10)
    (tmp_path / "train2017/000000000003.jpg").unlink()
    with pytest.raises(OptimaError, match=r"1 of 10 items cannot be used \(image-missing 1\).*000000000003.jpg"):
        open_records("coco", tmp_path, "train", max_rejected=0.05)
    records: Records = open_records("coco", tmp_path, "train", max_rejected=0.1)
    assert [(rejection.id, rejection.kind) for rejection in records.rejected] == [("3", "image-missing")]
