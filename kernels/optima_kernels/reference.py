"""Every loss written out in eager torch: the specification, and the oracle of the tests.

It imports nothing but torch and lends nothing to the code that it judges. Nothing here saves time or memory. It runs in
any float dtype up to float64 and gets its gradients from autograd.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# One tensor for all layers, or one entry a layer.
_PerLayer = Tensor | Sequence[Tensor | None] | None

LAYERNORM_EPS = 1e-5
L2_EPS = 1e-12


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

    - `kind="kl"`: one term `sum_j P_t log(P_t / P_s)` per valid row (h, i), one that attends to any key;
    - `kind="mse"`: one term `(P_s - P_t)^2` per valid element (h, i, j), an element being valid when i attends to j.

    Of H query heads and H_k key heads, H / H_k query heads that follow each other read one key head; for
    `heads="relation"` key heads are repeated for them before the concatenated heads are cut anew.
    `lse_s` and `lse_t` only save the other backends a pass: here the log-sum-exp is always computed.
    Arguments, shapes and errors are those of `optima_kernels.attention_map_loss`. The sums are kept in float32, or in
    float64 when an input is float64, and the result has that dtype.
    """
    dtype = _dtype(q_s, k_s, q_t, k_t)
    k_s, k_t = _of_every_query_head(k_s, q_s.shape[1]), _of_every_query_head(k_t, q_t.shape[1])
    if heads == "relation":
        assert relation_heads is not None
        q_s, k_s, q_t, k_t = (_regroup_heads(x, relation_heads) for x in (q_s, k_s, q_t, k_t))
    attends = _attended_elements(q_s.shape[2], k_s.shape[2], causal, mask, key_lengths, q_s.device)
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
    return _apply_gate(torch.where(count > 0, total / torch.where(count > 0, count, 1), 0), gate)


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
    mask: _PerLayer = None,
    key_lengths: _PerLayer = None,
    scale_s: float | None = None,
    scale_t: float | None = None,
    lse_s: _PerLayer = None,
    lse_t: _PerLayer = None,
    sample_weight: _PerLayer = None,
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
            _per_layer(mask, layers),
            _per_layer(key_lengths, layers),
            _per_layer(sample_weight, layers),
            strict=True,
        )
    ]
    return _apply_gate(torch.stack(losses), gate)


def hidden_mse(
    h_s: Tensor,
    h_t: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    normalize: str | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Mean squared error between the projected student state and the teacher state.

    With `p = h_s weight^T + bias` (`p = h_s` without a weight) and `n` the normalisation,
    `loss = gate * sum_i w_i sum_j (n(p_i)_j - n(h_t_i)_j)^2 / (D_t * sum_i w_i)`: a weighted mean over tokens `i` and
    teacher features `j`, where `w_i` is 0 for a masked token and the weight of the token's sample otherwise. It is 0
    when the weights sum to 0. What a masked token holds, NaN included, does not matter.

    `normalize="layernorm"` is layer normalisation over the features without gain and bias (eps 1e-5);
    `normalize="l2"` divides by the Euclidean length (at least 1e-12).
    """
    if mask is not None:
        h_s, h_t = (h.masked_fill(~mask.expand(h.shape[:-1])[..., None], 0.0) for h in (h_s, h_t))
    dtype = _dtype(h_s, h_t, weight, bias)
    projected = h_s.to(dtype)
    if weight is not None:
        projected = F.linear(projected, weight.to(dtype), None if bias is None else bias.to(dtype))
    error = (_normalized(projected, normalize) - _normalized(h_t.detach().to(dtype), normalize)).square().mean(-1)
    return _apply_gate(_weighted_mean(error, _token_weights(error, mask, sample_weight)), gate)


def hidden_mses(
    h_s: Sequence[Tensor],
    h_t: Sequence[Tensor],
    weight: _PerLayer = None,
    bias: _PerLayer = None,
    *,
    normalize: str | None = None,
    mask: _PerLayer = None,
    sample_weight: _PerLayer = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`hidden_mse` of every layer: one sequence entry a layer, `gate` [L], returns the losses [L].

    The optional arguments may also be one tensor that all layers share.
    """
    layers = len(h_s)
    losses = [
        hidden_mse(*arguments, normalize=normalize, mask=masks, sample_weight=sample_weights)
        for *arguments, masks, sample_weights in zip(
            h_s,
            h_t,
            *(_per_layer(argument, layers) for argument in (weight, bias, mask, sample_weight)),
            strict=True,
        )
    ]
    return _apply_gate(torch.stack(losses), gate)


def linear_kl(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor,
    w_t: Tensor,
    *,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divergence of the student's token distribution from the teacher's, each given as hidden state and head.

    `z = h w^T + bias` are the logits, `P_t = softmax(z_t / T)` and `P_s = softmax(z_s / T)`, and the loss is
    `gate * T^2 *` the mean of `_divergence_rows` over the tokens that `mask` keeps (0 when it keeps none).
    The factor `T^2` (Hinton, Vinyals, Dean 2015) keeps the size of the gradient when T changes.

    With `labels` (int64, one a token) the result is `(loss, cross_entropy)`: the cross entropy of `softmax(z_s)`, at
    T = 1, averaged over the tokens that `mask` keeps and whose label is not `ignore_index` (0 when there is none).
    `gate` multiplies both.
    """
    if mask is not None:
        h_s, h_t = (h.masked_fill(~mask.expand(h.shape[:-1])[..., None], 0.0) for h in (h_s, h_t))
    dtype = _dtype(h_s, w_s, h_t, w_t, bias_s, bias_t)
    z_s = F.linear(h_s.to(dtype), w_s.to(dtype), None if bias_s is None else bias_s.to(dtype))
    h_t, w_t = h_t.detach().to(dtype), w_t.detach().to(dtype)
    z_t = F.linear(h_t, w_t, None if bias_t is None else bias_t.detach().to(dtype))
    rows = _divergence_rows(z_s, z_t, temperature=temperature, divergence=divergence, beta=beta)
    kl = _apply_gate(temperature**2 * _weighted_mean(rows, _token_weights(rows, mask, None)), gate)
    if labels is None:
        return kl
    counted = labels != ignore_index
    nll = -z_s.log_softmax(-1).gather(-1, labels.masked_fill(~counted, 0)[..., None]).squeeze(-1)
    if mask is not None:
        counted = counted & mask
    return kl, _apply_gate(_weighted_mean(nll, counted.to(dtype)), gate)


def prediction_kl(
    z_s: Tensor,
    z_t: Tensor,
    *,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    sample_weight: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`linear_kl` on given logits `z` [..., V], with `sample_weight` [B] for the first dimension."""
    dtype = _dtype(z_s, z_t)
    rows = _divergence_rows(
        z_s.to(dtype), z_t.detach().to(dtype), temperature=temperature, divergence=divergence, beta=beta
    )
    return _apply_gate(temperature**2 * _weighted_mean(rows, _token_weights(rows, None, sample_weight)), gate)


def _regroup_heads(x_BHNd: Tensor, relation_heads: int) -> Tensor:
    """[B, H, N, d] -> [B, R, N, H * d / R]: the concatenated heads cut anew, as MiniLMv2 does (arXiv 2012.15828)."""
    x_BNHd = x_BHNd.transpose(1, 2)
    return x_BNHd.reshape(*x_BNHd.shape[:2], relation_heads, -1).transpose(1, 2)


def _of_every_query_head(k_BHMd: Tensor, query_heads: int) -> Tensor:
    return k_BHMd.repeat_interleave(query_heads // k_BHMd.shape[1], dim=1)


def _attended_elements(
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


def _divergence_rows(z_s: Tensor, z_t: Tensor, *, temperature: float, divergence: str, beta: float) -> Tensor:
    """Divergence of `P_s = softmax(z_s / T)` from `P_t = softmax(z_t / T)` in nats, a value a row.

    - `"forward"`: `KL(P_t || P_s)`
    - `"reverse"`: `KL(P_s || P_t)`
    - `"jsd"`: `beta KL(P_t || M) + (1 - beta) KL(P_s || M)` with `M = beta P_t + (1 - beta) P_s` and
      `0 < beta < 1`: the generalised Jensen-Shannon divergence of Agarwal et al., "On-Policy Distillation of Language
      Models" (GKD, arXiv 2306.13649, equation 1). It is 0 at both ends of beta; divided by `beta` it
      tends to the forward KL as beta goes to 0, and divided by `1 - beta` to the reverse KL as beta goes to 1.
    """
    lp_s, lp_t = (z_s / temperature).log_softmax(-1), (z_t / temperature).log_softmax(-1)
    if divergence == "forward":
        return (lp_t.exp() * (lp_t - lp_s)).sum(-1)
    if divergence == "reverse":
        return (lp_s.exp() * (lp_s - lp_t)).sum(-1)
    lp_m = torch.logaddexp(lp_t + math.log(beta), lp_s + math.log1p(-beta))
    return (beta * lp_t.exp() * (lp_t - lp_m) + (1.0 - beta) * lp_s.exp() * (lp_s - lp_m)).sum(-1)


def _token_weights(rows: Tensor, mask: Tensor | None, sample_weight: Tensor | None) -> Tensor:
    """A weight for each token, shaped and typed like `rows` [B, ...]: 0 where masked, else its sample's weight."""
    weights = torch.ones_like(rows)
    if sample_weight is not None:
        weights = weights * sample_weight.detach().to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
    if mask is not None:
        weights = weights * mask
    return weights


def _apply_gate(loss: Tensor, gate: Tensor | None) -> Tensor:
    """`gate * loss`, and exactly 0 with a zero gradient where the gate is 0, whatever the loss is there."""
    return loss if gate is None else torch.where(gate == 0, 0, loss * gate.to(loss.dtype))


def _per_layer(argument: _PerLayer, layers: int) -> Sequence[Tensor | None]:
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


def _weighted_mean(rows: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    return (rows * weights).sum() / torch.where(total == 0, 1.0, total)


def _normalized(h: Tensor, normalize: str | None) -> Tensor:
    if normalize == "layernorm":
        return F.layer_norm(h, h.shape[-1:], eps=LAYERNORM_EPS)
    if normalize == "l2":
        return F.normalize(h, dim=-1, eps=L2_EPS)
    return h


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 when any of `tensors` is float64."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
