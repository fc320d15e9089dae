"""What a layer shows of itself: its hidden state and the inputs of its attention maps.

Models return taps as explicit outputs rather than through hooks, so that torch.compile, FSDP and CUDA graphs see
them. A map is never stored: `q` and `k` define it, and the fused losses compare two maps from those.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor


class AttentionTap(NamedTuple):
    """The inputs of one attention map, softmax(scale * q k^T + mask).

    q: [B, H, N, d]. k: [B, H_k, M, d], H_k a divisor of H: each key head serves H / H_k query heads that follow each
        other.
    causal: query i attends to keys 0..i only.
    mask: bool, broadcasts to [B, H, N, M], True where the pair counts. A row without any True (a padded query) is not
        compared.
    lse: [B, H, N] natural log-sum-exp of the scaled, masked scores, if the forward pass computed it anyway.
    scale: factor of the scores; None for 1 / sqrt(d).
    unlike: "", or what else makes the model's map, such as "scores are soft-capped"; the objective refuses to compare
        it and says so.
    """

    q: Tensor
    k: Tensor
    causal: bool = False
    mask: Tensor | None = None
    lse: Tensor | None = None
    scale: float | None = None
    unlike: str = ""


class LayerTap(NamedTuple):
    """One layer's tap.

    hidden: [B, N, D] output of the layer.
    attention: its attention maps in order of computation (a decoder layer with cross-attention has two).
    valid: bool [B, N], True where a token counts; None when all do.
    """

    hidden: Tensor
    attention: tuple[AttentionTap, ...] = ()
    valid: Tensor | None = None


WantedTaps = Mapping[str, Sequence[int]]
"""Module name -> the layers whose taps are asked for, in ascending order. A module that is absent is not tapped."""

Taps = dict[str, tuple[LayerTap, ...]]
"""Module name -> taps of the wanted layers, in the order they were asked for."""
