"""What the public attention loss hands to a backend, and what it gets back.

A backend is a function `solve(layers, options, gate)`. It knows nothing of sample weights, means or the incoming
gradient: it returns, per layer and sample, the plain sum and the number of the loss's terms, and the gradient of the
plain sum, or of the mean where shapes alone tell that; `optima_kernels.attention.operator` does the rest.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optima_kernels.shared.dispatch import compute_dtype

Kind = Literal["kl", "mse"]
HeadMatching = Literal["match", "mean", "relation"]


@dataclass(frozen=True)
class Options:
    """What is compared. `mean_heads` compares the maps' means over heads; else head h is compared with head h.

    `evenly` says that samples count alike: then gradients are those of the mean over samples and terms, of each layer
    whose `known_terms` are known.
    """

    kind: Kind
    mean_heads: bool
    causal: bool
    with_grad: bool
    evenly: bool


class Layer(NamedTuple):
    """One layer: q [B, H, N, d], k [B, H_k, M, d], where H_k divides H and each key head serves H / H_k query heads
    that follow each other. H is the same on both sides unless heads are averaged; H_k and d never need be."""

    q_s: Tensor
    k_s: Tensor
    q_t: Tensor
    k_t: Tensor
    mask: Tensor | None  # [B or 1, H or 1, N or 1, M], any strides, bool or additive
    key_lengths: Tensor | None  # [B]
    lse_s: Tensor | None  # [B, H, N], natural log
    lse_t: Tensor | None
    scale_s: float
    scale_t: float


class Solution(NamedTuple):
    """A layer's result; the gradients are those of `total.sum()` times `gradient_factor`, and None where they were not
    asked for."""

    total: Tensor  # [B]
    terms: Tensor | float  # [B], how many, in the dtype of total; a number where the host knows that all have as many
    grad_q: Tensor | None  # [B, H, N, d], as `empty_gradients` says
    grad_k: Tensor | None  # [B, H_k, M, d]


def known_terms(layer: Layer, options: Options) -> float | None:
    """How many terms every sample has, where neither mask nor lengths have a say."""
    if layer.mask is not None or layer.key_lengths is not None:
        return None
    (heads, queries), keys = layer.q_s.shape[1:3], layer.k_s.shape[2]
    maps = 1 if options.mean_heads else heads
    if options.kind == "kl":
        return maps * queries
    if not options.causal:
        return maps * queries * keys
    diagonal = min(queries, keys)
    return maps * (diagonal * (diagonal + 1) / 2 + (queries - diagonal) * keys)


def gradient_factor(layer: Layer, options: Options) -> float:
    """See `Options.evenly`. An incoming gradient of 1 then leaves nothing to multiply in the backward pass."""
    terms = known_terms(layer, options)
    return 1.0 / (layer.q_s.shape[0] * terms) if options.evenly and terms else 1.0


def empty_gradients(layer: Layer, backend: str) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of q_s and k_s.

    "triton" keeps them in bfloat16 beside bfloat16 students, else in float32: of float16 the range is too small for
    plain sums, which the mean divides and a loss scale multiplies. "blocked" keeps them in the dtype of its sums, and
    that of k_s, still [B, H_k, M, d], is stored [B, H_k, d, M].
    """
    q_s, k_s = layer.q_s, layer.k_s
    if backend == "triton":
        dtype = torch.bfloat16 if q_s.dtype == k_s.dtype == torch.bfloat16 else torch.float32
        return q_s.new_empty(q_s.shape, dtype=dtype), k_s.new_empty(k_s.shape, dtype=dtype)
    dtype = compute_dtype(*layer[:4])
    return q_s.new_empty(q_s.shape, dtype=dtype), k_s.new_empty(k_s.transpose(2, 3).shape, dtype=dtype).transpose(2, 3)


def regroup_heads(x_BHNd: Tensor, relation_heads: int) -> Tensor:
    """[B, H, N, d] -> [B, R, N, H * d / R]: the concatenated heads cut anew, as MiniLMv2 does (arXiv 2012.15828)."""
    x_BNHd = x_BHNd.transpose(1, 2)
    return x_BNHd.reshape(*x_BNHd.shape[:2], relation_heads, -1).transpose(1, 2)
