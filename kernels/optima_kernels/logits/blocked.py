"""`linear_kl` from torch calls over blocks of tokens.

Both models' logits of a block of tokens are made in two scratch buffers. A few rows at a time, still in cache, the
student's turn into the gradient of the loss in them, which two matrix products then spend on the gradients of state
and head. So the forward pass does the four products of the usual way (and no more: making the logits again in the
backward pass would add 55 % at widths 512 and 768), and it keeps nothing but those gradients.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optima_kernels.logits.problem import Layer, Options, Solution
from optima_kernels.shared.gates import closed_gates
from optima_kernels.shared.tokens import token_weight

# A block of tokens has about this many logits of each model (32 MB of float32), but not fewer tokens than BLOCK_TOKENS,
# below which the products are bound by reading the heads.
BLOCK_ELEMENTS = 2**23
BLOCK_TOKENS = 192
# The rows worked on together have about this many logits of each model: 2 MB of float32.
CACHED_ELEMENTS = 2**19
# Rows of at most so many logits are compared in float64, which costs little there: in wider ones the rounding of single
# probabilities averages out.
NARROW = 512


def solve(layers: Sequence[Layer], options: Options, gate: Tensor | None) -> list[Solution]:
    """See `logits.problem`. Work behind a closed gate is saved where the host can see it: on a CPU."""
    closed = closed_gates(gate, len(layers))
    return [
        Solution.zero(layer, options) if shut else _solve(layer, options)
        for layer, shut in zip(layers, closed, strict=True)
    ]


def _solve(layer: Layer, options: Options) -> Solution:
    tokens, vocabulary, dtype, temperature = len(layer.h_s), len(layer.w_s), layer.dtype, options.temperature
    solution = Solution.empty(layer, options)
    for x in (solution.losses, solution.head, solution.bias):
        x.zero_()
    labelled = None if layer.labels is None else layer.labels >= 0
    weights = [_mean_weight(layer, counts) for counts in (layer.counts, labelled)]
    head_s, head_t = layer.w_s.to(dtype), layer.w_t.to(dtype)
    bias_s, bias_t = (None if b is None else b.to(dtype) / temperature for b in (layer.bias_s, layer.bias_t))
    block = block_tokens(options.budget_bytes, vocabulary, dtype, tokens)
    scratch_s, scratch_t = (layer.h_s.new_empty((block, vocabulary), dtype=dtype) for _ in range(2))

    for start in range(0, tokens, block):
        rows = slice(start, min(start + block, tokens))
        ignored = None if layer.counts is None else ~layer.counts[rows, None]
        state_s, state_t = (_counted(h[rows].to(dtype), ignored) for h in (layer.h_s, layer.h_t))
        z_s = _logits(state_s / temperature, head_s, bias_s, scratch_s)
        z_t = _logits(state_t / temperature, head_t, bias_t, scratch_t)
        _compare(layer, options, start, z_s, z_t, weights, solution.losses)
        if options.wants[0]:
            torch.mm(z_s, head_s, out=solution.state[rows])
        if options.wants[1]:
            solution.head.addmm_(z_s.t(), state_s)
        if options.wants[2]:
            solution.bias.add_(z_s.sum(0))
    solution.losses[0] *= temperature**2 / tokens
    solution.losses[1] /= tokens
    solution.scale.fill_(temperature / tokens if layer.labels is None else 1.0)
    return solution


def block_tokens(budget_bytes: int | None, vocabulary: int, dtype: torch.dtype, tokens: int) -> int:
    if budget_bytes is None:
        block = max(BLOCK_ELEMENTS // vocabulary, BLOCK_TOKENS)
    else:
        block = budget_bytes // (2 * vocabulary * dtype.itemsize)
    return max(min(block, tokens), 1)


def _counted(state: Tensor, ignored: Tensor | None) -> Tensor:
    return state if ignored is None else state.masked_fill(ignored, 0.0)


def _mean_weight(layer: Layer, counts: Tensor | None) -> Tensor:
    """What each token counts, of mean 1."""
    weight = token_weight(layer.h_s.shape[:1], counts, None, layer.dtype)
    return layer.h_s.new_ones(len(layer.h_s), dtype=layer.dtype) if weight is None else weight


def _compare(
    layer: Layer, options: Options, start: int, z_s: Tensor, z_t: Tensor, weights: Sequence[Tensor], sums: Tensor
) -> None:
    """Adds a block's values to `sums`, and turns `z_s` into their gradient; the logits are over temperature."""
    (rows, vocabulary), dtype, temperature = z_s.shape, z_s.dtype, options.temperature
    tokens = len(layer.h_s)
    cached = max(CACHED_ELEMENTS // vocabulary, 1)
    wide = torch.float64 if vocabulary <= NARROW else dtype
    factors = (1.0, options.label_weight) if layer.factors is None else layer.factors.unbind()

    for first in range(0, rows, cached):
        part = slice(first, min(first + cached, rows))
        of_all = slice(start + part.start, start + part.stop)
        weight, label_weight = (of_tokens[of_all] for of_tokens in weights)
        value, gradient = _divergence(z_s[part].to(wide), z_t[part].to(wide), options.divergence, options.beta)
        sums[0] += value.to(dtype).dot(weight)
        if layer.labels is None:
            z_s[part] = gradient.to(dtype).mul_(weight[:, None])
            continue
        gradient = gradient.to(dtype).mul_((weight * (factors[0] * (temperature / tokens)))[:, None])
        labels = layer.labels[of_all].clamp(min=0)[:, None]
        log_p = (z_s[part] * temperature).log_softmax(-1)
        sums[1] -= log_p.gather(1, labels)[:, 0].dot(label_weight)
        label_weight = label_weight * (factors[1] / tokens)
        extra = log_p.exp_().mul_(label_weight[:, None])
        z_s[part] = gradient.add_(extra.scatter_add_(1, labels, -label_weight[:, None]))


def _logits(state: Tensor, head: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    z = torch.mm(state, head.t(), out=scratch[: state.shape[0]])
    return z if bias is None else z.add_(bias)


def _divergence(z_s: Tensor, z_t: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """A value a row, and its gradient in `z_s`; the logits are over temperature.

    With u the derivative of the value in P_s, the gradient is P_s (u - sum P_s u), for every divergence.

    A divergence is of second order in r = log(P_s / P_t), a sum of terms of first order. So r is the difference of the
    logits below their rows' maxima (they are left so) less one number a row, not of two rounded logarithms; and
    KL(P_t || P_s) is summed as P_s - P_t - P_t r, which that number's rounding cannot reach: it moves P_s and P_t r
    alike.
    """
    p_s, p_t = (z.sub_(z.amax(-1, keepdim=True)).softmax(-1) for z in (z_s, z_t))
    log_sum_s, log_sum_t = (-p.amax(-1, keepdim=True).double().log() for p in (p_s, p_t))
    log_ratio = z_s.sub(z_t).sub_(log_sum_s - log_sum_t)
    if divergence == "forward":
        gradient = p_s.sub_(p_t)
        return gradient.sub(p_t.mul_(log_ratio)).sum(-1), gradient
    if divergence == "reverse":
        weighted = p_s * log_ratio
        mean = weighted.sum(-1, keepdim=True)
        value = weighted.sub_(p_s).add_(p_t).sum(-1)
        return value, log_ratio.sub_(mean).mul_(p_s)
    log_beta, log_rest = (log_ratio.new_full((), math.log(x)) for x in (beta, 1.0 - beta))
    over_teacher = torch.logaddexp(log_ratio + log_rest, log_beta)  # log(M / P_t)
    over_student = torch.logaddexp(log_beta - log_ratio, log_rest)
    of_student = torch.linalg.vecdot(p_s, over_student)
    value = (beta - 1.0) * of_student - beta * torch.linalg.vecdot(p_t, over_teacher)
    return value, over_student.sub_(of_student[:, None]).mul_(p_s).mul_(beta - 1.0)
