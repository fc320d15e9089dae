"""`linear_kl` from torch calls over blocks of tokens.

Both models' logits of a block of tokens are made in two scratch buffers. A few rows at a time, still in cache, the
student's turn into the gradient of the loss in them, which two matrix products then spend on the gradients of state
and head. So the forward pass does the four products of the usual way (and no more: making the logits again in the
backward pass would add 55 % at widths 512 and 768), and it keeps nothing but those gradients.
"""

import math

import torch
from torch import Tensor

from optima_kernels.logits_problem import Gradients, Problem

# A block of tokens has about this many logits of each model (32 MB of float32), but not fewer tokens than BLOCK_TOKENS,
# below which the products are bound by reading the heads.
BLOCK_ELEMENTS = 2**23
BLOCK_TOKENS = 192
# The rows worked on together have about this many logits of each model: 2 MB of float32.
CACHED_ELEMENTS = 2**19


def sweep(
    problem: Problem,
    divergence_weight: Tensor,
    labels: Tensor | None,
    label_weight: Tensor | None,
    wants: tuple[bool, bool, bool],
    gate: Tensor | None,
) -> tuple[Tensor, Gradients]:
    """See `logits_problem`. The gate is the caller's: torch calls cannot leave early without asking the host."""
    p, dtype = problem, problem.dtype
    (tokens, _), vocabulary = p.h_s.shape, p.w_s.shape[0]
    head_s, head_t = p.w_s.to(dtype), p.w_t.to(dtype)
    bias_s, bias_t = (None if b is None else b.to(dtype) / p.temperature for b in (p.bias_s, p.bias_t))
    counts = divergence_weight != 0 if label_weight is None else (divergence_weight != 0) | (label_weight != 0)
    sums = p.h_s.new_zeros(2, dtype=dtype)
    gradients = Gradients.empty(problem, wants)
    gradients.head.zero_()
    gradients.bias.zero_()
    block = min(max(BLOCK_ELEMENTS // vocabulary, BLOCK_TOKENS), max(tokens, 1))
    cached = max(CACHED_ELEMENTS // vocabulary, 1)
    scratch_s, scratch_t = (p.h_s.new_empty((block, vocabulary), dtype=dtype) for _ in range(2))

    for start in range(0, tokens, block):
        rows = slice(start, min(start + block, tokens))
        ignored = ~counts[rows, None]
        state_s, state_t = (h[rows].to(dtype).masked_fill(ignored, 0.0) for h in (p.h_s, p.h_t))
        z_s = _logits(state_s / p.temperature, head_s, bias_s, scratch_s)
        z_t = _logits(state_t / p.temperature, head_t, bias_t, scratch_t)
        for first in range(0, z_s.shape[0], cached):
            part = slice(first, min(first + cached, z_s.shape[0]))
            of_all = slice(start + part.start, start + part.stop)
            value, gradient = _divergence(z_s[part], z_t[part], p.divergence, p.beta)
            sums[0] += value.dot(divergence_weight[of_all])
            gradient.mul_(divergence_weight[of_all, None])
            if labels is not None and label_weight is not None:
                value, extra = _cross_entropy(z_s[part] * p.temperature, labels[of_all], label_weight[of_all])
                sums[1] += value
                gradient += extra
            z_s[part] = gradient
        if wants[0]:
            gradients.state[rows] = z_s @ head_s
        if wants[1]:
            gradients.head.addmm_(z_s.t(), state_s)
        if wants[2]:
            gradients.bias.add_(z_s.sum(0))
    return sums, gradients


def _logits(state: Tensor, head: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    z = torch.mm(state, head.t(), out=scratch[: state.shape[0]])
    return z if bias is None else z.add_(bias)


def _divergence(z_s: Tensor, z_t: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """A value a row, and its gradient in `z_s`; the logits are over temperature.

    With u the derivative of the value in P_s, the gradient is P_s (u - sum P_s u), for every divergence.
    """
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if divergence == "forward":
        p_t = log_t.exp()
        value = torch.linalg.vecdot(p_t, log_t.sub_(log_s))
        return value, log_s.exp_().sub_(p_t)
    p_s = log_s.exp()
    if divergence == "reverse":
        log_ratio = log_s.sub_(log_t)
        value = torch.linalg.vecdot(p_s, log_ratio)
        return value, log_ratio.sub_(value[:, None]).mul_(p_s)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    log_ratio = log_s.sub_(log_m)
    of_student = torch.linalg.vecdot(p_s, log_ratio)
    of_teacher = torch.linalg.vecdot(log_t.exp(), log_t - log_m)
    value = beta * of_teacher + (1.0 - beta) * of_student
    return value, log_ratio.sub_(of_student[:, None]).mul_(p_s).mul_(1.0 - beta)


def _cross_entropy(z: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of cross entropies, and its gradient in the logits `z`."""
    labels = labels.masked_fill(weight == 0, 0)[:, None]
    log_p = z.log_softmax(-1)
    value = -log_p.gather(1, labels)[:, 0].dot(weight)
    gradient = log_p.exp_().mul_(weight[:, None])
    return value, gradient.scatter_add_(1, labels, -weight[:, None])
