"""What is written is what is read."""

import dataclasses
import json
import math

import pytest

from optima.runs.rows import CrossAttention, LayerWork, Round, Sample, Summary, plain, read
from optima_core import OptimaError

SUMMARY = Summary(
    "vqa",
    {model: {"accuracy": 50.0} for model in ("teacher", "before", "after")},
    "accuracy",
    {"teacher": 4, "student": 2},
    {"teacher": 1.5, "student": 3.0},
    20,
    12.5,
    900.0,
    "optima --task vqa",
    {"torch": "2", "threads": 1},
    LayerWork(0.3, {"a": 0.1}),
    ({"step": 0.0, "accuracy": 50.0}, {"step": 10.0, "accuracy": 60.0}),
)
ROUND = Round(
    1,
    2,
    0,
    ("a", "b"),
    {"a": 1.0, "b": 3.0},
    {"a": 7.5, "b": 20.0},
    {"a": 0.25, "b": -0.5},
    0.5,
    {"a": 1},
    {"a": 0.5},
    {"a": 0.1},
    {"task": 1.0},
    {"task": 1.0},
    1e-3,
    0.5,
    0.1,
    3.0,
)
SAMPLE = Sample(
    ("samples/0.png",), None, "a dog", "a dog", "", "two dogs", {"teacher": True, "before": False, "after": False}
)
MAPS = CrossAttention("samples/0.png", ("a", "dog"), (((0.5, 0.5),), ((1.0, 0.0),)), (1, 2))


@pytest.mark.parametrize("written", [SUMMARY, ROUND, SAMPLE, MAPS], ids=lambda value: type(value).__name__)
def test_what_is_written_is_what_is_read(written: object) -> None:
    assert read(type(written), json.loads(json.dumps(plain(written))), "here") == written


def test_numbers_that_are_not_finite_are_written_as_null_and_read_as_missing() -> None:
    gone = dataclasses.replace(ROUND, reward=math.inf, mean={"a": math.nan, "b": 1.0})
    values = json.loads(json.dumps(plain(gone)))
    assert (values["reward"], values["mean"]) == (None, {"a": None, "b": 1.0})
    found = read(Round, values, "here")
    assert math.isnan(found.reward)
    assert found.mean == {"b": 1.0}


def test_what_is_missing_is_named() -> None:
    values = plain(SUMMARY)
    del values["task"]
    with pytest.raises(OptimaError, match=r"^here: no 'task'; a text is needed$"):
        read(Summary, values, "here")
    with pytest.raises(OptimaError, match=r"^here, 'layer_work', 'step_seconds': 'a' is \"slow\", not a number$"):
        read(Summary, plain(SUMMARY) | {"layer_work": {"step_seconds": {"a": "slow"}}}, "here")
