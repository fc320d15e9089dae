"""`hidden_mse` from torch calls over tiles of tokens.

A tile of the projected state becomes the difference from the teacher, then the gradient of the loss in it, and is spent
at once on the gradients of state, weight and bias: the same three matrix products as the usual way, a few tiles of
scratch, and nothing of the teacher's width kept for the backward pass, which only multiplies by the incoming gradient.
When no gradient is wanted it stops at the difference.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optima_kernels.dispatch import compute_dtype
from optima_kernels.reference import L2_EPS, LAYERNORM_EPS
from optima_kernels.registration import FusedOperator, multiply

# 4 MB of float32: large enough for matrix products at full speed, small enough to stay in the last-level cache.
# Measured on 2 cores at 64 x 257 tokens, 768 -> 1024: the three products take 380 ms in tiles, 560 ms in one piece.
TILE_ELEMENTS = 2**20


def _forward(
    h_s: Tensor,
    h_t: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    token_weight: Tensor | None,
    normalize: str | None,
    wants_state: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients in `h_s` [T, D_s], `weight` and `bias`; those that are not wanted are empty.

    The gradients lack the factor 2 / (T D_t): float16 could not hold them with it, and a loss scale comes too late.
    """
    (tokens, d_s), d_t = h_s.shape, h_t.shape[1]
    dtype = compute_dtype(*(x for x in (h_s, h_t, weight, bias) if x is not None))
    wide_weight, wide_bias = (None if x is None else x.to(dtype) for x in (weight, bias))
    loss = h_s.new_zeros((), dtype=dtype)
    d_state = h_s.new_empty(h_s.shape if wants_state else 0)
    d_weight = h_s.new_zeros((d_t, d_s) if wants_weight else 0, dtype=dtype)
    d_bias = h_s.new_zeros(d_t if wants_bias else 0, dtype=dtype)

    tile = max(TILE_ELEMENTS // max(d_s, d_t), 1)
    with torch.autocast(h_s.device.type, enabled=False):
        for start in range(0, tokens, tile):
            rows = slice(start, start + tile)
            state, teacher = h_s[rows].to(dtype), h_t[rows].to(dtype)
            weights = None if token_weight is None else token_weight[rows, None]
            if weights is not None:
                state, teacher = (x.masked_fill(weights == 0, 0.0) for x in (state, teacher))
            difference, pull_back = _difference(state, teacher, wide_weight, wide_bias, normalize)
            squares = torch.linalg.vecdot(difference, difference)
            loss += squares.sum() if weights is None else squares.dot(weights[:, 0])
            if not (wants_state or wants_weight or wants_bias):
                continue
            gradient = pull_back(difference if weights is None else difference.mul_(weights))
            if wants_state:
                d_state[rows] = gradient if wide_weight is None else gradient @ wide_weight
            if wants_weight:
                d_weight.addmm_(gradient.t(), state)
            if wants_bias:
                d_bias += gradient.sum(0)
    return loss / max(tokens * d_t, 1), d_state, d_weight, d_bias


PullBack = Callable[[Tensor], Tensor]


def _difference(
    state: Tensor, teacher: Tensor, weight: Tensor | None, bias: Tensor | None, normalize: str | None
) -> tuple[Tensor, PullBack]:
    """Projected student minus teacher, in fresh memory, and the map from a gradient in it to one in the projection."""
    if normalize is None:
        if weight is None:
            return state - teacher, _identity
        start = torch.neg(teacher) if bias is None else bias - teacher
        return start.addmm_(state, weight.t()), _identity
    projected = state if weight is None else F.linear(state, weight, bias)
    if normalize == "layernorm":
        normalized, pull_back = _layernorm(projected)
        return normalized.sub_(F.layer_norm(teacher, teacher.shape[-1:], eps=LAYERNORM_EPS)), pull_back
    normalized, pull_back = _l2(projected)
    return normalized - F.normalize(teacher, dim=-1, eps=L2_EPS), pull_back


def _identity(gradient: Tensor) -> Tensor:
    return gradient


def _layernorm(x: Tensor) -> tuple[Tensor, PullBack]:
    normalized, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, LAYERNORM_EPS)

    def pull_back(gradient: Tensor) -> Tensor:
        wanted = [True, False, False]
        d_x: Tensor = torch.ops.aten.native_layer_norm_backward(
            gradient, x, x.shape[-1:], mean, rstd, None, None, wanted
        )[0]
        return d_x

    return normalized, pull_back


def _l2(x: Tensor) -> tuple[Tensor, PullBack]:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    bounded = length.clamp_min(L2_EPS)
    normalized = x / bounded

    def pull_back(gradient: Tensor) -> Tensor:
        along = torch.linalg.vecdot(gradient, normalized)[:, None] * (length > L2_EPS)
        return (gradient - along * normalized) / bounded

    return normalized, pull_back


def _fake(
    h_s: Tensor,
    h_t: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    token_weight: Tensor | None,
    normalize: str | None,
    wants_state: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(*(x for x in (h_s, h_t, weight, bias) if x is not None))
    d_t = h_t.shape[1]
    return (
        h_s.new_empty((), dtype=dtype),
        h_s.new_empty(h_s.shape if wants_state else 0),
        h_s.new_empty((d_t, h_s.shape[1]) if wants_weight else 0, dtype=dtype),
        h_s.new_empty(d_t if wants_bias else 0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h_s, h_t, weight, bias = inputs[:4]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype if wanted else None for x, wanted in zip((h_s, weight, bias), inputs[6:], strict=True)]
    ctx.scale = 2.0 / max(h_t.numel(), 1)


def _backward(in_graph: bool, ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    d_state, d_weight, d_bias = (
        None if d_loss is None or dtype is None else multiply(gradient, d_loss * ctx.scale, in_graph).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return d_state, None, d_weight, d_bias, None, None, None, None, None


hidden_mse = FusedOperator("hidden_mse_blocked", _forward, _fake, _setup_context, _backward)
