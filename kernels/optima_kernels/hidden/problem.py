"""What a backend of `hidden_mse` is asked, and what it answers."""

from typing import NamedTuple

import torch
from torch import Tensor

from optima_kernels.shared.dispatch import compute_dtype

LAYERNORM_EPS = 1e-5
L2_EPS = 1e-12

# Normalised rows of at most so many features are compared in float64. Normalisation takes the part along the row (and,
# for layernorm, along the mean) from a gradient. In a row of two features that leaves a rounding error, since there is
# no other direction; of n features on average all but 2 / n is left, and the chance that less than a share x is falls
# as x^(n - 2).
NARROW = 8


class Gradients(NamedTuple):
    """Gradients of the student state [T, D_s], in its dtype, and of weight and bias, in the dtype of the loss.

    Those not wanted are empty. All lack the factor 2 / (T D_t): float16 could not hold them with it, and a loss scale,
    which multiplies the incoming gradient, comes too late.
    """

    state: Tensor
    weight: Tensor
    bias: Tensor


class Solution(NamedTuple):
    """A layer's loss, 0-d, and its gradients."""

    loss: Tensor
    gradients: Gradients


class HiddenTensors(NamedTuple):
    """One layer: `h_s` [T, D_s], `h_t` [T, D_t], `weight` [D_t, D_s], `bias` [D_t], `token_weight` [T] of mean 1."""

    h_s: Tensor
    h_t: Tensor
    weight: Tensor | None
    bias: Tensor | None
    token_weight: Tensor | None


class HiddenLayer(NamedTuple):
    """One layer's tensors, and which of `h_s`, `weight` and `bias` want a gradient."""

    tensors: HiddenTensors
    wants: tuple[bool, bool, bool]

    @property
    def dtype(self) -> torch.dtype:
        """What sums are kept in."""
        return compute_dtype(*(x for x in self.tensors[:4] if x is not None))

    def empty_gradients(self) -> Gradients:
        h_s, h_t = self.tensors.h_s, self.tensors.h_t
        shapes = (h_s.shape, (h_t.shape[1], h_s.shape[1]), h_t.shape[1:])
        dtypes = (h_s.dtype, self.dtype, self.dtype)
        return Gradients(
            *(h_s.new_empty(s if w else 0, dtype=d) for s, d, w in zip(shapes, dtypes, self.wants, strict=True))
        )
