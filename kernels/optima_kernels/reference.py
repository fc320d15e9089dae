"""Every loss written out in eager torch: the specification, and the oracle of the tests.

Nothing here saves time or memory. It runs in any float dtype up to float64 and gets its gradients from autograd.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optima_kernels.dispatch import compute_dtype

# One tensor for all layers, or one entry a layer.
PerLayer = Tensor | Sequence[Tensor | None] | None


def attention_map_loss(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    kind: str = "kl",
    heads: str = "match",
    relation_heads: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale_s: float | None = None,
    scale_t: float | None = None,
    lse_s: Tensor | None = None,
    lse_t: Tensor | None = None,
    sample_weight: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """How far the student's attention maps are from the teacher's, by materialising both.

    The maps are `P = softmax(scale * q k^T + mask)` per head, and the loss is
    `sum_b w_b sum_valid term / sum_b w_b count_b`, or 0 where the denominator is 0, with w the sample weights (1 if not
    given) and, per sample,

    - `kind="kl"`: one term `sum_j P_t log(P_t / P_s)` per valid row (h, i), a row being valid when it attends to any key;
    - `kind="mse"`: one term `(P_s - P_t)^2` per valid element (h, i, j), an element being valid when i attends to j.

    `lse_s` and `lse_t` only save the other backends a pass: here the log-sum-exp is always computed.
    Arguments, shapes and errors are those of `optima_kernels.attention_map_loss`. The sums are kept in float32, or in
    float64 when an input is float64, and the result has that dtype.
    """
    dtype = compute_dtype(q_s, k_s, q_t, k_t)
    if heads == "relation":
        assert relation_heads is not None
        q_s, k_s, q_t, k_t = (regroup_heads(x, relation_heads) for x in (q_s, k_s, q_t, k_t))
    attends = attended_elements(q_s.shape[2], k_s.shape[2], causal, mask, key_lengths, q_s.device)
    bias = mask.to(dtype) if mask is not None and mask.is_floating_point() else None
    log_p_s = _log_attention_map(q_s.to(dtype), k_s.to(dtype), scale_s, bias, attends)
    with torch.no_grad():
        log_p_t = _log_attention_map(q_t.to(dtype), k_t.to(dtype), scale_t, bias, attends)
    if heads == "mean":
        log_p_s = torch.logsumexp(log_p_s, dim=1, keepdim=True) - math.log(log_p_s.shape[1])
        log_p_t = torch.logsumexp(log_p_t, dim=1, keepdim=True) - math.log(log_p_t.shape[1])
    p_t = log_p_t.exp()
    if kind == "kl":
        terms = p_t * (log_p_t - log_p_s)
        valid = attends.any(dim=-1).expand(log_p_s.shape[:-1])
    else:
        terms = (log_p_s.exp() - p_t).square()
        valid = attends.expand(log_p_s.shape)
    terms = terms.masked_fill(~attends, 0.0)
    weight = torch.ones((), dtype=dtype, device=q_s.device) if sample_weight is None else sample_weight.to(dtype)
    total = (weight * terms.flatten(1).sum(1)).sum()
    count = (weight * valid.flatten(1).sum(1)).sum()
    return apply_gate(torch.where(count > 0, total / torch.where(count > 0, count, 1), 0), gate)


def attention_map_losses(
    q_s: Sequence[Tensor],
    k_s: Sequence[Tensor],
    q_t: Sequence[Tensor],
    k_t: Sequence[Tensor],
    *,
    kind: str = "kl",
    heads: str = "match",
    relation_heads: int | None = None,
    causal: bool = False,
    mask: PerLayer = None,
    key_lengths: PerLayer = None,
    scale_s: float | None = None,
    scale_t: float | None = None,
    lse_s: PerLayer = None,
    lse_t: PerLayer = None,
    sample_weight: PerLayer = None,
    gate: Tensor | None = None,
) -> Tensor:
    """One `attention_map_loss` per layer, stacked to [L]; arguments as in `optima_kernels.attention_map_losses`."""
    layers = len(q_s)
    losses = [
        attention_map_loss(
            q_s[i],
            k_s[i],
            q_t[i],
            k_t[i],
            kind=kind,
            heads=heads,
            relation_heads=relation_heads,
            causal=causal,
            mask=masks,
            key_lengths=lengths,
            scale_s=scale_s,
            scale_t=scale_t,
            sample_weight=weights,
        )
        for i, masks, lengths, weights in zip(
            range(layers),
            per_layer(mask, layers),
            per_layer(key_lengths, layers),
            per_layer(sample_weight, layers),
            strict=True,
        )
    ]
    return apply_gate(torch.stack(losses), gate)


def regroup_heads(x_BHNd: Tensor, relation_heads: int) -> Tensor:
    """[B, H, N, d] -> [B, R, N, H * d / R]: the concatenated heads cut anew, as MiniLMv2 does (arXiv 2012.15828)."""
    x_BNHd = x_BHNd.transpose(1, 2)
    return x_BNHd.reshape(*x_BNHd.shape[:2], relation_heads, -1).transpose(1, 2)


def attended_elements(
    queries: int,
    keys: int,
    causal: bool,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which query attends to which key: bool, broadcastable to [B, H, N, M].

    An additive mask forbids where it is -inf or its dtype's lowest finite value (what model code fills masks with);
    everything else it holds is a bias. Causal means key j <= query i, both counted from 0, as in torch's SDPA.
    """
    o_key = torch.arange(keys, device=device)
    attends = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if causal:
        attends = attends & (o_key <= torch.arange(queries, device=device)[:, None])
    if key_lengths is not None:
        attends = attends & (o_key < key_lengths[:, None, None, None])
    if mask is not None:
        attends = attends & (mask > torch.finfo(mask.dtype).min if mask.is_floating_point() else mask)
    return attends


def apply_gate(loss: Tensor, gate: Tensor | None) -> Tensor:
    """`gate * loss`, and exactly 0 with a zero gradient where the gate is 0, whatever the loss is there."""
    return loss if gate is None else torch.where(gate == 0, 0, loss * gate.to(loss.dtype))


def per_layer(argument: PerLayer, layers: int) -> Sequence[Tensor | None]:
    """One entry a layer from an argument that is a sequence already, or one tensor (or None) for all layers."""
    return [argument] * layers if argument is None or isinstance(argument, Tensor) else argument


def _log_attention_map(
    q_BHNd: Tensor, k_BHMd: Tensor, scale: float | None, bias: Tensor | None, attends: Tensor
) -> Tensor:
    """log P with 0 where nothing is attended to, so that no later step meets an infinity."""
    scores = (q_BHNd @ k_BHMd.transpose(-1, -2)) * (q_BHNd.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~attends, -math.inf).masked_fill(~attends.any(-1, keepdim=True), 0.0)
    return scores.log_softmax(-1).masked_fill(~attends, 0.0)
