"""Fewer and narrower attention heads that write what the teacher's write, as nearly as their rank allows."""

import math

import torch
from torch import Tensor, nn

Affine = tuple[Tensor, Tensor]
"""A weight [out, in] and a bias [out]."""


def narrow_heads(
    parts: tuple[Affine, Affine, Affine],
    out: nn.Linear,
    moments: tuple[Tensor, Tensor],
    heads: int,
    its_heads: int,
    width: int,
) -> tuple[Affine, Affine, Affine, Tensor]:
    """Queries, keys, values (weight [D_t, in], bias [D_t]) and outputs [D, D_t] -> the same of `heads` heads.

    moments: second moments [in + 1, in + 1] of what queries, and keys and values, are made of, with a 1 behind.
    width: of all heads together, the student's.
    """
    each, narrow = out.in_features // its_heads, width // heads
    # [heads, d, in + 1]: the bias is the weight of the 1.
    q, k, v = (torch.cat([weight, bias[:, None]], dim=1).view(its_heads, each, -1) for weight, bias in parts)
    o = out.weight.double().T.reshape(its_heads, each, -1)  # [heads, d, D]
    gram_q, gram_k, gram_v = (x @ moment @ x.mT for x, moment in ((q, moments[0]), (k, moments[1]), (v, moments[1])))
    gram_o = o @ o.mT
    kept = strongest((gram_v * gram_o.mT).sum(dim=(1, 2)), heads)
    if narrow < each:
        # Scores are divided by the root of a head's width.
        for_q, for_k = _best_rank(gram_q, gram_k, narrow)
        for_v, for_o = _best_rank(gram_v, gram_o, narrow)
        q, k = for_q.mT @ q * math.sqrt(narrow / each), for_k.mT @ k
        v, o = for_v.mT @ v, for_o.mT @ o
    q, k, v = (x[kept].flatten(0, 1) for x in (q, k, v))
    return (q[:, :-1], q[:, -1]), (k[:, :-1], k[:, -1]), (v[:, :-1], v[:, -1]), o[kept].flatten(0, 1).T


def _best_rank(gram_a: Tensor, gram_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Of two factors A, B by their Gram matrices [..., d, d]: mixtures [..., d, rank] of the columns of each.

    The product of the mixed factors is the best approximation of A B^T of that rank.
    """
    roots, inverses = zip(*(_root(gram) for gram in (gram_a, gram_b)), strict=True)
    u, s, vh = torch.linalg.svd(roots[0] @ roots[1])
    root = s[..., None, :rank].sqrt()
    return inverses[0] @ u[..., :rank] * root, inverses[1] @ vh.mT[..., :rank] * root


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive semidefinite matrix, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    root = values.sqrt()
    inverse = torch.where(values > 1e-12 * values[..., -1:], 1 / root, torch.zeros_like(root))
    return vectors * root[..., None, :] @ vectors.mT, vectors * inverse[..., None, :] @ vectors.mT


def strongest(strength: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest, in their order."""
    return strength.topk(count).indices.sort().values
