"""How hard a module's layer losses pull at the student, and whether they pull where the predictions do."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optima_core.shards import local

Gradients = Sequence[Tensor | None]
"""Of the student's parameters, in their order; None where a loss does not reach a parameter."""


class Pull(NamedTuple):
    """What the layer losses of a module do beside the prediction losses; float32, 0-d, on the device.

    ratio: norm of the predictions' gradient, divided by that of the layer losses'.
    agreement: cosine of the two gradients over the parameters that the layer losses reach, -1 to 1.
    """

    ratio: Tensor
    agreement: Tensor


def compare_pulls(
    predictions: Gradients, module: Gradients, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Pull:
    """The pull of a module, from the gradients of the prediction losses and of its layer losses.

    total: adds up sums over the shards of parameters; the identity where each rank holds all of them. A parameter of
        whose gradient all elements are 0 counts as not reached. Without any gradient, ratio and agreement are 0.
    """
    alone = [local(p) for p, m in zip(predictions, module, strict=True) if m is None and p is not None]
    ours = [local(m) for m in module if m is not None]
    theirs = [
        torch.zeros_like(local(m)) if p is None else local(p)
        for p, m in zip(predictions, module, strict=True)
        if m is not None
    ]
    squares, others, products = total(torch.stack([_squares(ours), _squares(theirs), _products(ours, theirs)]))
    rest = total(_squares(alone).sum()) if alone else squares.new_zeros(())

    norm = squares.sum().sqrt()
    reached = torch.where(squares > 0, others, 0.0).sum().sqrt()
    least = torch.finfo(torch.float32).tiny
    return Pull(
        ratio=torch.where(norm > 0, (others.sum() + rest).sqrt() / norm.clamp(min=least), 0.0),
        agreement=torch.where(norm * reached > 0, products.sum() / (norm * reached).clamp(min=least), 0.0),
    )


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """Squared norms, float32 [tensors]."""
    return torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float32)) ** 2


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner products, float32 [tensors]."""
    return torch.stack([found.float().sum() for found in torch._foreach_mul(list(left), list(right))])
