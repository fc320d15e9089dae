"""Models that cannot be run on pictograms are refused before they are."""

import pytest

from optima.coca import HeadSpec
from optima.tasks.fit import refuse_misfit
from optima_core import OptimaError


def test_a_model_that_fits_is_let_through(make_coca) -> None:
    refuse_misfit(make_coca(), "teacher")


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"image_size": 32}, "teacher x takes pictures of 32 pixels"),
        ({"vocab_size": 20}, "teacher x has a vocabulary of 20 tokens"),
        ({"context_length": 5}, "teacher x reads texts of 5 tokens"),
        ({"heads": {"vqa": HeadSpec(3)}}, "teacher x has a head for vqa"),
        ({"heads": {"mood": HeadSpec(3)}}, "teacher x has a head for mood"),
    ],
)
def test_a_misfit_is_named(make_coca, sizes, complaint: str) -> None:
    with pytest.raises(OptimaError, match=complaint):
        refuse_misfit(make_coca(**sizes), "teacher x")
