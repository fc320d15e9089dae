"""What a backend of `linear_kl` is asked, and what it answers.

A backend offers `solve(layers, options, gate) -> list[Solution]`; `linear_kl` has one layer, the head. `gate` is [L],
on the tensors' device, or None; behind a closed one losses and gradients are 0.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optima_kernels.shared.dispatch import compute_dtype


@dataclass(frozen=True)
class Options:
    """`temperature`, `divergence` and `beta` as in `linear_kl`.

    `label_weight` is what a cross entropy counts beside a divergence, `wants` says which of the student's state, head
    and bias get gradients, `head_dtype` what that of the head is summed in, None for the dtype of the sums, and
    `budget_bytes` how much the logits of a chunk of tokens may take, None for what the backend finds best.
    """

    temperature: float
    divergence: str
    beta: float
    label_weight: float
    wants: tuple[bool, bool, bool]
    head_dtype: torch.dtype | None = None
    budget_bytes: int | None = None


class Layer(NamedTuple):
    """Both heads, with tokens flat: `h` [T, D], `w` [V, D], `bias` [V]; the teacher's are detached.

    A token counts where `counts` [T], bool, is True (everywhere, if None), and has a label where `labels` [T], int64,
    is not -1; what other tokens hold does not matter. `factors` [2] multiply what divergence and cross entropy add to
    the gradients; without them that is 1 and the options' `label_weight`.
    """

    h_s: Tensor
    w_s: Tensor
    bias_s: Tensor | None
    h_t: Tensor
    w_t: Tensor
    bias_t: Tensor | None
    counts: Tensor | None
    labels: Tensor | None
    factors: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """What sums are kept in."""
        return compute_dtype(*(x for x in self[:6] if x is not None))


class Solution(NamedTuple):
    """`losses` [2]: the divergence times temperature squared, and the cross entropy (0 without labels), each a mean
    over the tokens that it counts. The gradients of the student's state, head and bias, empty where not wanted, are
    still to be multiplied by `scale`, 0-d. All but the head's are in the dtype of the sums.
    """

    losses: Tensor
    scale: Tensor
    state: Tensor
    head: Tensor
    bias: Tensor

    @classmethod
    def empty(cls, layer: Layer, options: Options) -> "Solution":
        h_s, sums = layer.h_s, layer.dtype
        gradients = (h_s.new_empty(shape, dtype=dtype) for shape, dtype in cls._gradients(layer, options))
        return cls(h_s.new_empty(2, dtype=sums), h_s.new_empty((), dtype=sums), *gradients)

    @classmethod
    def bytes_of(cls, layer: Layer, options: Options) -> int:
        """What its gradients take."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in cls._gradients(layer, options))

    @staticmethod
    def _gradients(layer: Layer, options: Options) -> Iterator[tuple[Sequence[int], torch.dtype]]:
        """Shape and dtype of those of state, head and bias."""
        sums = layer.dtype
        shapes = (layer.h_s.shape, layer.w_s.shape, layer.w_s.shape[:1])
        for shape, dtype, wanted in zip(shapes, (sums, options.head_dtype or sums, sums), options.wants, strict=True):
            yield (shape if wanted else (0,)), dtype

    @classmethod
    def zero(cls, layer: Layer, options: Options) -> "Solution":
        return cls(*(x.zero_() for x in cls.empty(layer, options)))
