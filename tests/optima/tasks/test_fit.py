"""Models that cannot be run on a data set are refused before they are."""

import pytest

from optima.coca import HeadSpec
from optima.tasks.fit import refuse_headless, refuse_misfit
from optima.tasks.pictograms import PictogramTask
from optima_core import OptimaError

VQA = PictogramTask("vqa")


def test_a_model_that_fits_is_let_through(make_coca) -> None:
    refuse_misfit(make_coca(), "teacher", VQA)
    refuse_headless(make_coca(), "teacher", VQA)
    refuse_misfit(make_coca(heads={"nlvr2": HeadSpec(7)}), "teacher", VQA)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"image_size": 32}, "teacher x takes images of 32 pixels"),
        ({"vocab_size": 20}, "teacher x has a vocabulary of 20 tokens"),
        ({"context_length": 5}, "teacher x reads texts of 5 tokens"),
        ({"heads": {"vqa": HeadSpec(3)}}, "teacher x has a head for vqa"),
    ],
)
def test_a_misfit_is_named(make_coca, sizes, complaint: str) -> None:
    with pytest.raises(OptimaError, match=complaint):
        refuse_misfit(make_coca(**sizes), "teacher x", VQA)


def test_a_model_without_the_head_is_named_and_captioning_needs_none(make_coca) -> None:
    model = make_coca(heads={"nlvr2": HeadSpec(2, 2)})
    with pytest.raises(OptimaError, match=r"teacher x has no head for vqa \(it has nlvr2\)"):
        refuse_headless(model, "teacher x", VQA)
    refuse_headless(model, "teacher x", PictogramTask("captioning"))
