"""`hidden_mse` from torch calls over tiles of tokens.

A tile of the projected state becomes the difference from the teacher, then the gradient of the loss in it, and is spent
at once on the gradients of state, weight and bias: the same three matrix products as the usual way, a few tiles of
scratch, and nothing of the teacher's width kept for the backward pass, which only multiplies by the incoming gradient.
When no gradient is wanted it stops at the difference. Products are float32's, or, of large bfloat16 factors on a CPU
that multiplies those, bfloat16's, rounded as autocast's are.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from optima_kernels.hidden.problem import L2_EPS, LAYERNORM_EPS, NARROW, Layer, Options, Solution
from optima_kernels.shared.cpu_products import add_product, in_bfloat16, linear, product
from optima_kernels.shared.gates import closed_gates

# 2 MB of float32: large enough for matrix products at full speed, small enough to stay in the cache. Measured on one
# core at 4 x 577 tokens, 768 -> 1024, layer-normalised: 52 ms so, 74 ms in tiles of 2^21, 54 ms in tiles of 2^18.
TILE_ELEMENTS = 2**19

PullBack = Callable[[Tensor], Tensor]


def solve(layers: Sequence[Layer], options: Options, gate: Tensor | None) -> list[Solution]:
    """Loss and gradients of every layer, one after the other; those that the host sees closed cost nothing."""
    closed = closed_gates(gate, len(layers))
    return [
        _nothing(layer) if skipped else _solve(layer, options.normalize)
        for layer, skipped in zip(layers, closed, strict=True)
    ]


def _nothing(layer: Layer) -> Solution:
    return Solution(*(x.zero_() for x in layer.empty_solution()))


def _solve(layer: Layer, normalize: str | None) -> Solution:
    h_s, h_t, weight, bias, token_weight, (wants_state, wants_weight, wants_bias), _ = layer
    (tokens, d_s), d_t = h_s.shape, h_t.shape[1]
    dtype = layer.dtype
    tile = max(TILE_ELEMENTS // max(d_s, d_t), 1)
    narrow = weight is not None and in_bfloat16(min(tile, tokens) * weight.numel(), h_s, weight)
    of_products = h_s.dtype if narrow else dtype
    wide_bias = None if bias is None else bias.to(dtype)
    factor_weight = None if weight is None else weight.to(of_products)
    scaled_weight = None if factor_weight is None else factor_weight * layer.factor
    solution = layer.empty_solution()
    for sums in (solution.loss, solution.weight, solution.bias):
        sums.zero_()

    for start in range(0, tokens, tile):
        rows = slice(start, start + tile)
        state, teacher = h_s[rows].to(of_products), h_t[rows].to(dtype)
        weights = None if token_weight is None else token_weight[rows, None]
        if weights is not None:
            state, teacher = (x.masked_fill(weights == 0, 0.0) for x in (state, teacher))
        difference, pull_back = _difference(state, teacher, factor_weight, wide_bias, normalize)
        squares = torch.linalg.vecdot(difference, difference).to(dtype)
        solution.loss.add_(squares.sum() if weights is None else squares.dot(weights[:, 0]))

        if not any(layer.wants):
            continue
        gradient = pull_back(difference if weights is None else difference.mul_(weights)).to(dtype)
        if wants_bias:
            solution.bias.add_(gradient.sum(0))
        gradient = gradient.to(of_products)
        if wants_state:
            solution.state[rows] = (
                gradient.mul_(layer.factor) if scaled_weight is None else product(gradient, scaled_weight)
            )
        if wants_weight:
            add_product(solution.weight, gradient.t(), state)
    for sums in (solution.weight, solution.bias):
        sums.mul_(layer.factor)
    return solution._replace(loss=solution.loss / max(tokens * d_t, 1))


def _difference(
    state: Tensor, teacher: Tensor, weight: Tensor | None, bias: Tensor | None, normalize: str | None
) -> tuple[Tensor, PullBack]:
    """Projected student minus teacher, in fresh memory, and the map from a gradient in it to one in the projection."""
    if normalize is None:
        if weight is None:
            return state - teacher, _identity
        start = torch.neg(teacher) if bias is None else bias - teacher
        return add_product(start, state, weight.t()), _identity
    of_state = None if bias is None else bias.to(state.dtype)
    projected = state if weight is None else linear(state, weight, of_state).to(teacher.dtype)
    if teacher.shape[1] <= NARROW:
        projected, teacher = projected.double(), teacher.double()
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
        backward = torch.ops.aten.native_layer_norm_backward
        return cast(Tensor, backward(gradient, x, x.shape[-1:], mean, rstd, None, None, wanted)[0])

    return normalized, pull_back


def _l2(x: Tensor) -> tuple[Tensor, PullBack]:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    bounded = length.clamp_min(L2_EPS)
    normalized = x / bounded

    def pull_back(gradient: Tensor) -> Tensor:
        along = torch.linalg.vecdot(gradient, normalized)[:, None] * (length > L2_EPS)
        return cast(Tensor, (gradient - along * normalized) / bounded)

    return normalized, pull_back
