"""Attention-map distillation that never holds an attention map.

The usual way asks both models for eager attention and stores B x H x N x M floats a layer, twice, and autograd stores
them again. But the loss is a sum over rows of the maps, and the gradient of a row's loss needs that row alone. So a
tile of scores is recomputed from q and k, compared, turned into its share of the gradients of q and k, and forgotten.

All of that happens in the forward pass: while a tile's scores are at hand the gradients cost two more matrix products,
where a backward pass of its own would first recompute both maps. The gradients found are those of the plain sum; the
mean, the sample weights, the gate and the incoming gradient are factors per sample, so backward is one multiplication.
Between the passes two tensors of the size of q_s and k_s are alive, and no teacher tensor is.
"""

from collections.abc import Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from optima_kernels import reference
from optima_kernels.attention.operator import attention_operator
from optima_kernels.attention.problem import HeadMatching, Kind, regroup_heads
from optima_kernels.shared.checks import (
    check_choice,
    check_device,
    check_floating,
    check_gate,
    check_layers,
    check_shape,
)
from optima_kernels.shared.dispatch import choose_backend, compute_dtype
from optima_kernels.shared.layers import PerLayer, per_layer
from optima_kernels.shared.variants import attention_variant


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
    backend: str | None = None,
) -> Tensor:
    """How far the student's attention maps are from the teacher's: a scalar.

    The maps are `P = softmax(scale * q k^T + mask)` per head. The loss is
    `gate * sum_b w_b sum_valid term / sum_b w_b count_b`, and 0 where the denominator is 0, with, per sample b,

    - `kind="kl"`: one term `sum_j P_t log(P_t / P_s)` per valid row (h, i); a row that attends to no key is not valid;
    - `kind="mse"`: one term `(P_s - P_t)^2` per valid element (h, i, j), those where query i attends to key j.

    Args:
        q_s: student queries [B, H, N, d]; float32, float16, bfloat16 or, except on the triton backend, float64. Any
            strides. Gets a gradient.
        k_s: student keys [B, H_k, M, d]; M differs from N in cross attention. H_k divides H: each key head serves
            H / H_k query heads that follow each other, as in grouped-query attention. Gets a gradient.
        q_t: teacher queries [B, H_t, N, d_t]. Never gets a gradient.
        k_t: teacher keys [B, H_tk, M, d_t], grouped or not whatever the student's are. Never gets a gradient.
        kind: "kl" or "mse".
        heads: "match" compares head h with head h and needs H = H_t; "mean" compares the maps' means over heads;
            "relation" first cuts the concatenated heads of each side anew into `relation_heads` heads (MiniLMv2,
            arXiv 2012.15828), so that both widths H * d and H_t * d_t must be divisible by it; grouped key heads are
            repeated for that, once for each query head that reads them.
        relation_heads: how many heads to cut, with `heads="relation"` only.
        causal: query i attends to keys j <= i only, both counted from 0 (as torch's `is_causal`).
        mask: broadcastable to [B, H, N, M] (one head with "mean", `relation_heads` with "relation"). Bool: True
            attends. Float: added to the scaled scores of both sides; -inf and the dtype's lowest finite value forbid.
        key_lengths: integer [B]; only the first `key_lengths[b]` keys of sample b are attended to.
        scale_s: of the student's scores; by default d ** -0.5, d being the width after any regrouping.
        scale_t: of the teacher's scores, likewise.
        lse_s: log-sum-exp (natural) of the student's masked, scaled scores [B, H, N], if the forward attention kept
            it. With the teacher's it saves the other backends a pass, and changes nothing else; rows without a key may
            hold anything.
        lse_t: the teacher's.
        sample_weight: w, [B]; 1 if not given.
        gate: 0-d tensor that multiplies the loss; where it is 0, loss and gradients are 0 and no work is done, on a
            CPU or by the triton backend.
        backend: "reference", "blocked" or "triton"; by default triton on CUDA and blocked elsewhere.

    Returns:
        The loss, float64 if any of q and k is, float32 otherwise. Sums are kept in that dtype, also under autocast, and
        each gradient has the dtype of its argument. The same inputs give the same bits.

    Raises:
        ValueError: a shape, device, choice or `backend` does not fit.
        TypeError: a tensor has the wrong kind of dtype.
    """
    check_gate(gate)
    return attention_map_losses(
        [q_s],
        [k_s],
        [q_t],
        [k_t],
        kind=kind,
        heads=heads,
        relation_heads=relation_heads,
        causal=causal,
        mask=mask,
        key_lengths=key_lengths,
        scale_s=scale_s,
        scale_t=scale_t,
        lse_s=lse_s,
        lse_t=lse_t,
        sample_weight=sample_weight,
        gate=None if gate is None else gate[None],
        backend=backend,
    ).squeeze(0)


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
    backend: str | None = None,
) -> Tensor:
    """`attention_map_loss` of several layers: the losses [L].

    `q_s`, `k_s`, `q_t` and `k_t` hold one tensor a layer, all of one batch size; `mask`, `key_lengths`, `lse_s`,
    `lse_t` and `sample_weight` one entry a layer, or one tensor for all layers. `gate` is [L]. Scales are shared. The
    triton backend launches layers of equal shapes together. Otherwise as `attention_map_loss`.
    """
    layers = len(q_s)
    optional = {"mask": mask, "key_lengths": key_lengths, "lse_s": lse_s, "lse_t": lse_t}
    check_layers(layers, like="q_s", k_s=k_s, q_t=q_t, k_t=k_t, sample_weight=sample_weight, **optional)
    check_choice("kind", kind, get_args(Kind))
    check_choice("heads", heads, get_args(HeadMatching))
    check_gate(gate, layers)
    masks, lengths, lses_s, lses_t, weights = (per_layer(x, layers) for x in (*optional.values(), sample_weight))
    for arguments in zip(q_s, k_s, q_t, k_t, masks, lengths, lses_s, lses_t, weights, strict=True):
        _check_layer(*arguments, heads=heads, relation_heads=relation_heads, like=q_s[0], gate=gate)
    variant = partial(
        attention_variant,
        q_s,
        k_s,
        q_t,
        kind=kind,
        heads=heads,
        relation_heads=relation_heads,
        causal=causal,
        mask=masks,
        key_lengths=lengths,
        lse_s=lses_s,
        lse_t=lses_t,
        gate=gate,
    )
    chosen = choose_backend(backend, q_s[0], "attention_map_losses", variant)
    if chosen == "triton" and compute_dtype(*q_s, *k_s, *q_t, *k_t) == torch.float64:
        raise ValueError('backend="triton" takes float32, bfloat16 and float16, not float64; use backend="blocked"')
    if chosen == "reference":
        return reference.attention_map_losses(
            q_s,
            k_s,
            q_t,
            k_t,
            kind=kind,
            heads=heads,
            relation_heads=relation_heads,
            causal=causal,
            mask=mask,
            key_lengths=key_lengths,
            scale_s=scale_s,
            scale_t=scale_t,
            sample_weight=sample_weight,
            gate=gate,
        )
    masks = [
        None if x is None else x[(None,) * (4 - x.dim())].expand(-1, -1, -1, k.shape[2])
        for x, k in zip(masks, k_s, strict=True)
    ]
    if relation_heads is not None:
        k_s, k_t = ([_as_many_heads(k, q) for k, q in zip(*side, strict=True)] for side in ((k_s, q_s), (k_t, q_t)))
        q_s, k_s, q_t, k_t = ([regroup_heads(x, relation_heads) for x in side] for side in (q_s, k_s, q_t, k_t))
    return attention_operator(
        *map(list, (q_s, k_s, q_t, k_t, masks, lengths, lses_s, lses_t, weights)),
        gate,
        [q.shape[-1] ** -0.5 if scale_s is None else scale_s for q in q_s],
        [q.shape[-1] ** -0.5 if scale_t is None else scale_t for q in q_t],
        kind,
        heads == "mean",
        causal,
        chosen,
        torch.is_grad_enabled() and any(x.requires_grad for x in (*q_s, *k_s)),
    )[0]


def _as_many_heads(k: Tensor, q: Tensor) -> Tensor:
    """Keys repeated for each query head that reads them."""
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _check_layer(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    lse_s: Tensor | None,
    lse_t: Tensor | None,
    sample_weight: Tensor | None,
    *,
    heads: str,
    relation_heads: int | None,
    like: Tensor,
    gate: Tensor | None,
) -> None:
    check_floating(like, q_s=q_s, k_s=k_s, q_t=q_t, k_t=k_t, lse_s=lse_s, lse_t=lse_t, sample_weight=sample_weight)
    check_device(like, mask=mask, key_lengths=key_lengths, gate=gate)
    for name, x in {"q_s": q_s, "k_s": k_s, "q_t": q_t, "k_t": k_t}.items():
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be [B, H, tokens, d] with no dimension of size 0, not {tuple(x.shape)}")
    batch, heads_s, queries, d_s = q_s.shape
    heads_t, keys, d_t = q_t.shape[1], k_s.shape[2], q_t.shape[3]
    if batch != like.shape[0]:
        raise ValueError(f"q_s must have one batch size in all layers, not both {like.shape[0]} and {batch}")
    check_shape("k_s", k_s, (batch, k_s.shape[1], keys, d_s), "batch and width of q_s")
    check_shape("q_t", q_t, (batch, heads_t, queries, d_t), "batch and queries of q_s")
    check_shape("k_t", k_t, (batch, k_t.shape[1], keys, d_t), "batch and width of q_t, keys of k_s")
    for side, q, k in (("s", q_s, k_s), ("t", q_t, k_t)):
        if q.shape[1] % k.shape[1]:
            raise ValueError(
                f"k_{side} must have a number of heads that divides the {q.shape[1]} heads of q_{side}, "
                f"not {k.shape[1]}"
            )
    if (relation_heads is not None) != (heads == "relation"):
        raise ValueError(f'relation_heads must be given with heads="relation" and only then, not {relation_heads!r}')
    maps_s, maps_t, maps = heads_s, heads_t, heads_s
    if heads == "match" and heads_s != heads_t:
        raise ValueError(
            f'heads="match" needs as many teacher heads as student heads, not {heads_t} and {heads_s}; compare means '
            'over heads with heads="mean", or regroup the widths with heads="relation"'
        )
    if heads == "mean":
        maps = 1
    elif relation_heads is not None:
        maps_s = maps_t = maps = relation_heads
        for name, width in (("student", heads_s * d_s), ("teacher", heads_t * d_t)):
            if relation_heads < 1 or width % relation_heads:
                raise ValueError(f"relation_heads must divide the {name}'s width H * d = {width}, not {relation_heads}")
    if mask is not None:
        _check_mask(mask, (batch, maps, queries, keys))
    if key_lengths is not None:
        if key_lengths.is_floating_point() or key_lengths.dtype == torch.bool:
            raise TypeError(f"key_lengths must be an integer tensor, not {key_lengths.dtype}")
        check_shape("key_lengths", key_lengths, (batch,), "one length a sample")
    if lse_s is not None:
        check_shape("lse_s", lse_s, (batch, maps_s, queries), "one log-sum-exp a row of the student's maps")
    if lse_t is not None:
        check_shape("lse_t", lse_t, (batch, maps_t, queries), "one log-sum-exp a row of the teacher's maps")
    if sample_weight is not None:
        check_shape("sample_weight", sample_weight, (batch,), "one weight a sample")


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool (True attends) or floating point (added to the scores), not {mask.dtype}")
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > 4 or any(given not in (1, size) for given, size in sizes):
        raise ValueError(f"mask must broadcast to {shape}, [B, maps, N, M], not have shape {tuple(mask.shape)}")
