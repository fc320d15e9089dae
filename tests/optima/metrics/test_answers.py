"""VQA accuracy and NLVR2's consistency, against the benchmarks' evaluators."""

import json
from pathlib import Path

import pytest

from optima.metrics import consistency, vqa_accuracy

GOLDEN = json.loads((Path(__file__).with_name("golden") / "vqa.json").read_text(encoding="utf-8"))


def test_vqa_accuracy_is_the_reference_evaluators() -> None:
    assert len(GOLDEN) == 400
    assert len({row["accuracy"] for row in GOLDEN}) >= 5
    for row in GOLDEN:
        assert vqa_accuracy(row["answer"], row["annotators"]) == pytest.approx(row["accuracy"], abs=1e-9), row


def test_leaving_one_annotator_out_each_time_gives_three_agreeing_ones_nine_tenths() -> None:
    said = ["yes"] * 3 + ["no"] * 7
    assert vqa_accuracy("yes", said) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("maybe", said) == 0


def test_a_statement_is_consistent_if_all_its_pairs_are_right() -> None:
    items = {"dev-1-0-0": True, "dev-1-1-0": True, "dev-1-0-1": True, "dev-1-1-1": False, "dev-2-0-0": False}
    assert consistency(list(items.values()), list(items)) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="split-set-pair-sentence"):
        consistency([True], ["dev-1-0"])
