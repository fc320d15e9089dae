"""Scores and submission files of official data sets, on miniatures whose truth is known."""

import csv
import json
from pathlib import Path

import pytest
from miniatures import MAKERS

from optima.data.config import DataName
from optima.data.records import Records, open_records
from optima.task import TASKS
from optima.tasks.scoring import has_truth, score, submission

SCORES = {
    "captioning": {"cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"},
    "vqa": {"accuracy"},
    "nlvr2": {"accuracy", "consistency"},
    "snli_ve": {"accuracy", "accuracy/entailment", "accuracy/neutral", "accuracy/contradiction"},
}


def right_answers(records: Records) -> list[str]:
    if records.task == "captioning":
        return [record.text for record in records.items]
    if records.task == "vqa":
        return [record.answers[0] if record.answers else "yes" for record in records.items]
    return [records.classes[record.target] for record in records.items]


def miniature(name: DataName, root: Path, split: str = "validation") -> Records:
    MAKERS[name](root)
    return open_records(name, root, split)


@pytest.mark.parametrize("name", MAKERS)
def test_right_answers_score_everything_and_wrong_ones_nothing(name: DataName, tmp_path: Path) -> None:
    records = miniature(name, tmp_path)
    everything = list(range(len(records)))
    right = score(records, everything, right_answers(records))
    assert set(right.scores) == SCORES[records.task]
    assert all(value == pytest.approx(100) for metric, value in right.scores.items() if metric != "cider_d")
    assert right.scores.get("cider_d", 1000) > 100
    assert right.correct == [True] * len(records)
    assert TASKS[records.task].headline in right.scores
    others = {"captioning": "x y z", "vqa": "no idea"}
    said = [others.get(records.task) or records.classes[record.target - 1] for record in records.items]
    wrong = score(records, everything, said)
    assert max(wrong.scores.values()) < 1e-3
    assert wrong.correct == [False] * len(records)


def test_scores_are_of_the_items_that_were_predicted(tmp_path: Path) -> None:
    records = miniature("nlvr2", tmp_path)
    said = right_answers(records)
    said[7] = "true" if said[7] == "false" else "false"
    # Items 6 and 7 are one statement about two pairs.
    found = score(records, [3, 6, 7], [said[3], said[6], said[7]])
    assert found.scores == {"accuracy": pytest.approx(200 / 3), "consistency": pytest.approx(50)}
    assert found.correct == [True, True, False]
    assert found.indices == [3, 6, 7]


@pytest.mark.parametrize("name", ["coco", "vqav2"])
def test_a_split_without_published_truth_gives_predictions_but_no_scores(name: DataName, tmp_path: Path) -> None:
    records = miniature(name, tmp_path, "test")
    assert not has_truth(records)
    found = score(records, [0, 1], ["a", "b"])
    assert found.scores == {}
    assert found.predictions == ["a", "b"]
    assert submission(records, [0, 1], ["a", "b"])[1].count("a") >= 1


def test_coco_results_are_image_id_and_caption(tmp_path: Path) -> None:
    records = miniature("coco", tmp_path)
    name, text = submission(records, [2, 0], ["a café", 'a "sign"'])
    assert name == "captions_val_optima_results.json"
    assert json.loads(text) == [{"image_id": 1002, "caption": "a café"}, {"image_id": 1000, "caption": 'a "sign"'}]


def test_vqav2_results_are_question_id_and_answer(tmp_path: Path) -> None:
    records = miniature("vqav2", tmp_path, "test")
    name, text = submission(records, [0, 1], ["yes", "2"])
    assert name == "vqa_OpenEnded_mscoco_test2015_optima_results.json"
    assert json.loads(text) == [{"question_id": 20000, "answer": "yes"}, {"question_id": 20010, "answer": "2"}]


def test_nlvr2_predictions_are_what_its_evaluator_reads(tmp_path: Path) -> None:
    records = miniature("nlvr2", tmp_path)
    name, text = submission(records, [0, 1], ["true", "false"])
    assert name == "nlvr2_dev_predictions.csv"
    assert list(csv.reader(text.splitlines())) == [["dev-0-0-0", "True"], ["dev-0-1-0", "False"]]


def test_snli_ve_and_folder_predictions_are_lines_of_their_own_fields(tmp_path: Path) -> None:
    records = miniature("snli_ve", tmp_path / "ve")
    name, text = submission(records, [0], ["neutral"])
    assert name == "snli_ve_dev_predictions.jsonl"
    assert json.loads(text) == {"pairID": records[0].id, "gold_label": "neutral"}
    records = miniature("folder", tmp_path / "own")
    name, text = submission(records, [1], ["a dog"])
    assert name == "folder_validation_predictions.jsonl"
    assert json.loads(text) == {"file_name": "images/1.jpg", "caption": "a dog"}
