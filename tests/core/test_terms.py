"""Names of losses: one encoder, one decoder, one order."""

import pytest

from optima_core.terms import LossGroup, LossTerm, record_order

NAMES = {
    LossTerm("task"): "task",
    LossTerm("logits"): "logits",
    LossTerm("hidden", "image_encoder", 11): "hidden/image_encoder/11",
    LossTerm("attention", "front", 0): "attention/front/0",
}


@pytest.mark.parametrize("term", NAMES)
def test_a_name_and_its_term_are_each_others_inverse(term: LossTerm) -> None:
    assert term.name == NAMES[term]
    assert LossTerm.parse(term.name) == term


@pytest.mark.parametrize(
    "name", ["", "tusk", "hidden", "hidden/front", "hidden/front/one", "task/front/0/1", "maps/a/0", "hidden//0"]
)
def test_what_is_no_name_of_a_loss_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="/MODULE/LAYER"):
        LossTerm.parse(name)


def test_records_list_the_losses_of_a_layer_together() -> None:
    groups = (
        LossGroup("task"),
        LossGroup("hidden", "front", (0, 1, 2)),
        LossGroup("attention", "front", (0, 2)),
        LossGroup("attention", "front", (1,)),
        LossGroup("hidden", "back", (0,)),
    )
    order = record_order(groups)
    names = "task hidden/front/0 attention/front/0 hidden/front/1 attention/front/1 hidden/front/2 attention/front/2"
    assert [term.name for term, _, _ in order] == [*names.split(), "hidden/back/0"]
    assert [place for _, _, place in order] == [0, 0, 0, 1, 0, 2, 1, 0]
    assert all(term.layer == group.layers[place] for term, group, place in order if group.layers)
