"""Norm ratio and cosine of gradients, beside the same of one long vector in float64."""

import pytest
import torch
from torch import Tensor

from optima_core.pulls import compare_pulls


def gradients(seed: int, shapes: list[tuple[int, ...]], missing: tuple[int, ...] = ()) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [None if place in missing else tensor for place, tensor in enumerate(drawn)]


SHAPES: list[tuple[int, ...]] = [(3, 4), (5,), (2, 2, 2), (7,)]


def test_ratio_and_agreement_are_those_of_the_whole_gradients(seed: int) -> None:
    predictions, module = gradients(seed, SHAPES), gradients(seed + 1, SHAPES, missing=(1, 3))
    found = compare_pulls(predictions, module)
    p = [torch.zeros(shape) if x is None else x for x, shape in zip(predictions, SHAPES, strict=True)]
    ours = torch.cat([m.flatten() for m in module if m is not None]).double()
    theirs = torch.cat([x.flatten() for x, m in zip(p, module, strict=True) if m is not None]).double()
    everything = torch.cat([x.flatten() for x in p]).double()
    assert found.ratio.item() == pytest.approx((everything.norm() / ours.norm()).item(), rel=1e-5)
    assert found.agreement.item() == pytest.approx((ours @ theirs / ours.norm() / theirs.norm()).item(), abs=1e-5)


def test_a_gradient_of_zeros_reaches_nothing(seed: int) -> None:
    """As a module behind a gate, or a sharded parameter that a loss does not reach, has it."""
    predictions, module = gradients(seed, SHAPES), gradients(seed + 1, SHAPES, missing=(1,))
    filled = [torch.zeros(5) if m is None else m for m in module]
    for ours, theirs in zip(compare_pulls(predictions, filled), compare_pulls(predictions, module), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_predictions_need_not_reach_what_a_module_reaches(seed: int) -> None:
    predictions, module = gradients(seed, SHAPES, missing=(0, 2)), gradients(seed + 1, SHAPES)
    filled = [torch.zeros(s) if p is None else p for p, s in zip(predictions, SHAPES, strict=True)]
    for ours, theirs in zip(compare_pulls(predictions, module), compare_pulls(filled, module), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_pulls_nowhere() -> None:
    zeros: list[Tensor | None] = [torch.zeros(3)]
    assert [float(x) for x in compare_pulls([torch.ones(3)], zeros)] == [0.0, 0.0]
    assert [float(x) for x in compare_pulls(zeros, [torch.ones(3)])] == [0.0, 0.0]


def test_shards_add_up(seed: int) -> None:
    """What two ranks hold of each gradient, and their sums added up, are the whole."""
    predictions, module = gradients(seed, [(6, 4), (8,)]), gradients(seed + 1, [(6, 4), (8,)])
    halves = [[[x[: len(x) // 2], x[len(x) // 2 :]] for x in of if x is not None] for of in (predictions, module)]
    told: list[list[Tensor]] = [[], []]
    for rank in range(2):
        ours, theirs = ([x[rank] for x in of] for of in halves)
        compare_pulls(ours, theirs, lambda sums, rank=rank: told[rank].append(sums) or sums)  # type: ignore[misc]
    whole = iter([first + second for first, second in zip(*told, strict=True)])
    ours, theirs = ([x[0] for x in of] for of in halves)
    for found, expected in zip(
        compare_pulls(ours, theirs, lambda _: next(whole)), compare_pulls(predictions, module), strict=True
    ):
        torch.testing.assert_close(found, expected)
