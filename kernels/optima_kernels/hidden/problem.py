"""What a backend of `hidden_mse` is asked, and what it answers.

A backend offers `solve(layers, options, gate) -> list[Solution]`. `gate` is [L], on the tensors' device, or None;
behind a closed one loss and gradients are 0.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optima_kernels.shared.dispatch import compute_dtype

NORMALIZATIONS = (None, "layernorm", "l2")
LAYERNORM_EPS = 1e-5
L2_EPS = 1e-12

# Normalised rows of at most so many features are compared in float64. Normalisation takes the part along the row (and,
# for layernorm, along the mean) from a gradient. In a row of two features that leaves a rounding error, since there is
# no other direction; of n features on average all but 2 / n is left, and the chance that less than a share x is falls
# as x^(n - 2).
NARROW = 8


@dataclass(frozen=True)
class Options:
    """What holds for every layer of a call: `normalize` as in `hidden_mse`."""

    normalize: str | None = None


class Layer(NamedTuple):
    """`h_s` [T, D_s], `h_t` [T, D_t], `weight` [D_t, D_s], `bias` [D_t], `token_weight` [T] of mean 1; and which of
    `h_s`, `weight` and `bias` want a gradient; that of `weight` has the dtype `weight_dtype`."""

    h_s: Tensor
    h_t: Tensor
    weight: Tensor | None
    bias: Tensor | None
    token_weight: Tensor | None
    wants: tuple[bool, bool, bool]
    weight_dtype: torch.dtype

    @property
    def factor(self) -> float:
        """What gradients are multiplied by: see `Solution`."""
        return 1.0 if self.h_s.dtype == torch.float16 else 2.0 / max(self.h_t.numel(), 1)

    @property
    def dtype(self) -> torch.dtype:
        """What sums are kept in."""
        return compute_dtype(*(x for x in (self.h_s, self.h_t, self.weight, self.bias) if x is not None))

    def empty_solution(self) -> "Solution":
        d_s, d_t, sums = self.h_s.shape[1], self.h_t.shape[1], self.dtype
        of_state, of_weight, of_bias = self.wants
        return Solution(
            loss=self.h_s.new_empty((), dtype=sums),
            state=self.h_s.new_empty(self.h_s.shape if of_state else 0),
            weight=self.h_s.new_empty((d_t, d_s) if of_weight else 0, dtype=self.weight_dtype),
            bias=self.h_s.new_empty(d_t if of_bias else 0, dtype=sums),
        )


class Solution(NamedTuple):
    """A layer's loss, 0-d, and its gradients: of the student state [T, D_s], in its dtype, of the weight, and of the
    bias in the dtype of the loss.

    Those not wanted are empty. With a state of float16 all lack the factor 2 / (T D_t): float16 could not hold them
    with it, and a loss scale, which multiplies the incoming gradient, comes too late.
    """

    loss: Tensor
    state: Tensor
    weight: Tensor
    bias: Tensor
