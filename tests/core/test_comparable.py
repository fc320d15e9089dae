"""Maps that cannot be compared are refused in a line, and scales are those of each side."""

from typing import Any

import pytest
import torch

from optima_core import AttentionTap, Forward, LayerTap, ModulePair, Objective, ObjectiveConfig, OptimaError
from optima_core.comparable import refuse_other_masks
from optima_core.terms import LossGroup
from optima_kernels import reference

PAIR = ModulePair("decoder", 2, 2, 8, 8)


def taps(**given: Any) -> tuple[LayerTap, ...]:
    """Two layers of two heads that share one key head."""
    return tuple(
        LayerTap(torch.randn(3, 5, 8), (AttentionTap(torch.randn(3, 2, 5, 4), torch.randn(3, 1, 5, 4), **given),))
        for _ in range(2)
    )


def shown(layers: tuple[LayerTap, ...]) -> Forward:
    return Forward(None, None, {"decoder": layers})


def compare(student: tuple[LayerTap, ...], teacher: tuple[LayerTap, ...]) -> torch.Tensor:
    objective = Objective([PAIR], ObjectiveConfig())
    with objective.comparing_masks() as differing:
        losses = objective(shown(student), shown(teacher), {"decoder": None})
    refuse_other_masks({where: float(share) for where, share in differing.items()})
    return losses[LossGroup("attention", "decoder", (0, 1))]


def test_each_side_has_its_own_scale(seed: int) -> None:
    student, teacher = taps(scale=0.1), taps(scale=1.0)
    expected = [
        reference.attention_map_loss(*ours.attention[0][:2], *theirs.attention[0][:2], scale_s=0.1, scale_t=1.0)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(compare(student, teacher), torch.stack(expected))


def test_layers_of_different_scales_are_each_compared_with_theirs(seed: int) -> None:
    student, teacher = (taps(scale=0.1)[0], taps(scale=0.7)[1]), taps()
    objective = Objective([PAIR], ObjectiveConfig())
    losses = objective(shown(student), shown(teacher), {"decoder": None})
    for layer, scale in enumerate((0.1, 0.7)):
        expected = reference.attention_map_loss(
            *student[layer].attention[0][:2], *teacher[layer].attention[0][:2], scale_s=scale
        )
        torch.testing.assert_close(losses[LossGroup("attention", "decoder", (layer,))][0], expected)


def test_a_map_of_more_than_q_and_k_is_refused_on_either_side(seed: int) -> None:
    capped = taps(unlike="scores are soft-capped")
    for student, teacher, side in ((capped, taps(), "student"), (taps(), capped, "teacher")):
        with pytest.raises(OptimaError, match=f"module decoder, student layer 0: the {side}'s map.*soft-capped"):
            compare(student, teacher)
    objective = Objective([PAIR], ObjectiveConfig(attention=0))
    assert torch.isfinite(objective.total(objective(shown(capped), shown(taps()), {"decoder": None})))


def test_masks_that_differ_are_refused_when_compared(seed: int) -> None:
    window = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    with pytest.raises(OptimaError, match="different pairs of tokens"):
        compare(taps(mask=window), taps(causal=True))
    with pytest.raises(OptimaError, match="different pairs of tokens"):
        compare(taps(), taps(causal=True))


def test_the_same_pairs_told_in_two_ways_are_the_same(seed: int) -> None:
    lower = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    assert torch.isfinite(compare(taps(mask=lower), taps(causal=True))).all()


def test_other_numbers_of_tokens_or_maps_are_refused(seed: int) -> None:
    longer = tuple(LayerTap(torch.randn(3, 6, 8), (AttentionTap(*torch.randn(2, 3, 2, 6, 4)),)) for _ in range(2))
    with pytest.raises(OptimaError, match=r"the student has \[3, 5\] tokens, the teacher \[3, 6\]"):
        compare(taps(), longer)
    maps = tuple(tap._replace(hidden=torch.randn(3, 5, 8)) for tap in longer)
    with pytest.raises(OptimaError, match="5 queries and 5 keys, the teacher's 6 and 6"):
        compare(taps(), maps)
    with pytest.raises(OptimaError, match="1 attention maps and the teacher's layer 0"):
        compare(taps(), tuple(LayerTap(torch.randn(3, 5, 8)) for _ in range(2)))


def test_without_labels_there_is_no_task_loss(seed: int) -> None:
    objective = Objective([PAIR], ObjectiveConfig())
    losses = objective(shown(taps()), shown(taps()), {"decoder": None})
    assert {group.kind for group in losses} == {"hidden", "attention"}
    torch.testing.assert_close(
        objective.total(losses), sum(values.mean() for values in losses.values()), check_dtype=False
    )


def test_nothing_to_learn_from_is_said() -> None:
    objective = Objective([PAIR], ObjectiveConfig(hidden=0, attention=0))
    with pytest.raises(OptimaError, match="no loss to learn from"):
        objective(shown(()), shown(()), {})
