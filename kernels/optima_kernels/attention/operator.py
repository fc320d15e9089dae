"""The attention-map loss as an operator of torch: weights, means and gates around what a backend solves."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from optima_kernels.attention import blocked
from optima_kernels.attention.problem import Kind, Layer, Options, Solution, empty_gradients, known_terms
from optima_kernels.shared.dispatch import compute_dtype
from optima_kernels.shared.gates import apply_gate
from optima_kernels.shared.registration import FusedOperator, multiply

Tensors = Sequence[Tensor]
MaybeTensors = Sequence[Tensor | None]


def _forward(
    q_s: Sequence[Tensor],
    k_s: Sequence[Tensor],
    q_t: Sequence[Tensor],
    k_t: Sequence[Tensor],
    mask: Sequence[Tensor | None],
    key_lengths: Sequence[Tensor | None],
    lse_s: Sequence[Tensor | None],
    lse_t: Sequence[Tensor | None],
    sample_weight: Sequence[Tensor | None],
    gate: Tensor | None,
    scales_s: Sequence[float],
    scales_t: Sequence[float],
    kind: str,
    mean_heads: bool,
    causal: bool,
    backend: str,
    with_grad: bool,
) -> list[Tensor]:
    """Losses [L], the factor to multiply gradients by, and those (q and k of every layer). The factor is [L, B]; where
    the gradients are those of the losses before their gates [L, 1], and without gates [L, 0].

    Lists have one entry a layer: q and k [B, H, tokens, d], mask [B or 1, maps or 1, N or 1, M], key_lengths [B], lse
    [B, maps, N], sample_weight [B]; gate is [L].
    """
    layers = list(map(Layer, q_s, k_s, q_t, k_t, mask, key_lengths, lse_s, lse_t, scales_s, scales_t))
    evenly = all(w is None for w in sample_weight)
    options = Options(cast(Kind, kind), mean_heads, causal, with_grad, evenly)
    solutions = _solve(layers, options, gate, backend)
    total, terms = _stacked([x.total for x in solutions]), [x.terms for x in solutions]
    if _are_final(layers, options):
        losses = total.sum(1) * (1.0 / (total.shape[1] * cast(float, terms[0])))
        factor = total.new_empty((len(total), 0)) if gate is None else gate[:, None].to(total.dtype, copy=True)
    else:
        losses, factor = _weighted_means(total, terms, sample_weight)
        factor = factor if gate is None else factor * gate[:, None].to(factor.dtype)
    losses = apply_gate(losses, gate)
    return [losses, factor, *(x for layer in solutions for x in (layer.grad_q, layer.grad_k) if x is not None)]


def _are_final(layers: Sequence[Layer], options: Options) -> bool:
    """Whether a backend's gradients are those of the losses: without weights, of layers of as many terms."""
    if not options.evenly:
        return False
    first, *others = (known_terms(layer, options) for layer in layers)
    return first is not None and all(terms == first for terms in others)  # symbols have no hash


def _weighted_means(
    total: Tensor, terms: Sequence[Tensor | float], sample_weight: MaybeTensors
) -> tuple[Tensor, Tensor]:
    """Losses [L] of sums [L, B], terms [B] and weights [B], and what a layer's gradients are multiplied by [L, B]: that
    of layers with a number of terms is 1 where there are no weights, see `gradient_factor`."""
    unweighted = all(w is None for w in sample_weight)
    numbers = [x for x in terms if not isinstance(x, Tensor)]
    count = _stacked([x if isinstance(x, Tensor) else total.new_full(total.shape[1:], x) for x in terms])
    weight = torch.ones_like(total)
    if not unweighted:
        weights = zip(sample_weight, total, strict=True)
        weight = torch.stack([torch.ones_like(x) if w is None else w.to(x.dtype) for w, x in weights])
    denominator = (weight * count).sum(1)
    counted = denominator > 0
    factor = torch.where(counted[:, None], weight / torch.where(counted, denominator, 1)[:, None], 0)
    losses = torch.where(counted, (factor * total).sum(1), 0)
    if unweighted and numbers:
        rows = zip(factor, terms, strict=True)
        factor = torch.stack([row if isinstance(x, Tensor) else torch.ones_like(row) for row, x in rows])
    return losses, factor


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return rows[0][None] if len(rows) == 1 else torch.stack(list(rows))


def _solve(layers: Sequence[Layer], options: Options, gate: Tensor | None, backend: str) -> list[Solution]:
    if backend == "triton":
        from optima_kernels.attention import triton

        return triton.solve(layers, options, gate)
    return blocked.solve(layers, options, gate)


def _fake(
    q_s: Tensors,
    k_s: Tensors,
    q_t: Tensors,
    k_t: Tensors,
    mask: MaybeTensors,
    key_lengths: MaybeTensors,
    lse_s: MaybeTensors,
    lse_t: MaybeTensors,
    sample_weight: MaybeTensors,
    gate: Tensor | None,
    scales_s: Sequence[float],
    scales_t: Sequence[float],
    kind: str,
    mean_heads: bool,
    causal: bool,
    backend: str,
    with_grad: bool,
) -> list[Tensor]:
    layers = list(map(Layer, q_s, k_s, q_t, k_t, mask, key_lengths, lse_s, lse_t, scales_s, scales_t))
    options = Options(cast(Kind, kind), mean_heads, causal, with_grad, all(w is None for w in sample_weight))
    dtype = compute_dtype(*(x for layer in layers for x in layer[:4]))
    factors = q_s[0].shape[0]
    if _are_final(layers, options):
        factors = 0 if gate is None else 1
    factor = q_s[0].new_empty((len(layers), factors), dtype=dtype)
    gradients = [x for layer in layers for x in empty_gradients(layer, backend)] if with_grad else []
    return [factor.new_empty(len(layers)), factor, *gradients]


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for pair in zip(*inputs[:2], strict=True) for x in pair]
    ctx.backend = inputs[15]
    # A list of nothing but tensors is owed a list of gradients.
    ctx.without_gradient = [
        [None] * len(x) if isinstance(x, list) and all(isinstance(y, Tensor) for y in x) else None for x in inputs
    ]


def _backward(in_graph: bool, ctx: Any, d_losses: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if d_losses is None:
        return tuple(ctx.without_gradient)
    factor, *gradients = ctx.saved_tensors
    factors = d_losses[:, None] * factor if factor.shape[1] else d_losses
    if ctx.backend == "triton" and not in_graph and torch._C._functorch.maybe_get_level(d_losses) < 0:
        return *_scale_together(gradients, factors, ctx.dtypes), *ctx.without_gradient[2:]
    if factor.shape[1]:
        factors = factors[:, :, None, None, None]
    scaled = [
        multiply(gradient, factors[i // 2], in_graph, dtype)
        for i, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True))
    ]
    return scaled[::2], scaled[1::2], *ctx.without_gradient[2:]


def _scale_together(
    gradients: Sequence[Tensor], factors: Tensor, dtypes: Sequence[torch.dtype]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of q and of k, q and k in turn, times a factor a layer, [L] or [L, 1], or also a sample, [L, B]."""
    from optima_kernels.shared.scaling import scaled

    keep = torch._C._autograd._get_current_graph_task_keep_graph()  # another backward pass may come to read them
    layers, scales = range(len(factors)), [1.0] * len(factors)
    q, k = (scaled(gradients[i::2], layers, factors, scales, dtypes[i::2], keep) for i in range(2))
    return q, k


attention_operator = FusedOperator("attention_map_losses", _forward, _fake, _setup_context, _backward)
