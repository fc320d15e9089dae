"""What the public attention loss hands to a backend, and what it gets back.

A backend knows nothing of sample weights, means or the incoming gradient. It returns, per layer and sample, the plain
sum and the number of the loss's terms, and the gradient of the plain sum; `optima_kernels.attention` does the rest.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from optima_kernels.shared.dispatch import compute_dtype

Kind = Literal["kl", "mse"]
HeadMatching = Literal["match", "mean", "relation"]


@dataclass(frozen=True)
class MapOptions:
    """What is compared. `mean_heads` compares the maps' means over heads; else head h is compared with head h."""

    kind: Kind
    mean_heads: bool
    causal: bool


class MapLayer(NamedTuple):
    """One layer: q [B, H, N, d], k [B, H, M, d]; H is shared unless heads are averaged, d never need be."""

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


class MapSums(NamedTuple):
    """A layer's result; the gradients are those of `total.sum()`, and None where they were not asked for."""

    total: Tensor  # [B]
    terms: Tensor  # [B], how many; same dtype as total
    grad_q: Tensor | None  # [B, H, N, d], compute dtype
    grad_k: Tensor | None  # [B, H, M, d], compute dtype


def empty_gradients(layer: MapLayer, keys_last: bool = False) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of q_s and k_s, in the dtype that sums are kept in.

    With `keys_last` that of k_s, still [B, H, M, d], is stored [B, H, d, M].
    """
    q_s, k_s, q_t, k_t = layer[:4]
    dtype = compute_dtype(q_s, k_s, q_t, k_t)
    grad_q = q_s.new_empty(q_s.shape, dtype=dtype)
    if keys_last:
        return grad_q, k_s.new_empty(k_s.transpose(2, 3).shape, dtype=dtype).transpose(2, 3)
    return grad_q, k_s.new_empty(k_s.shape, dtype=dtype)


def regroup_heads(x_BHNd: Tensor, relation_heads: int) -> Tensor:
    """[B, H, N, d] -> [B, R, N, H * d / R]: the concatenated heads cut anew, as MiniLMv2 does (arXiv 2012.15828)."""
    x_BNHd = x_BHNd.transpose(1, 2)
    return x_BNHd.reshape(*x_BNHd.shape[:2], relation_heads, -1).transpose(1, 2)
