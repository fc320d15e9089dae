"""`linear_kl` from torch calls over blocks of tokens.

Both models' logits of a block of tokens are made in two scratch buffers. A few rows at a time, still in cache, the
student's turn into the gradient of the loss in them, which two matrix products then spend on the gradients of state
and head. So the forward pass does the four products of the usual way (and no more: making the logits again in the
backward pass would add 55 % at widths 512 and 768), and it keeps nothing but those gradients.
"""

import math

import torch
from torch import Tensor

from optima_kernels.logits.problem import Gradients, Problem

# A block of tokens has about this many logits of each model (32 MB of float32), but not fewer tokens than BLOCK_TOKENS,
# below which the products are bound by reading the heads.
BLOCK_ELEMENTS = 2**23
BLOCK_TOKENS = 192
# The rows worked on together have about this many logits of each model: 2 MB of float32.
CACHED_ELEMENTS = 2**19
# Rows of at most so many logits are compared in float64, which costs little there: in wider ones the rounding of single
# probabilities averages out.
NARROW = 512


def sweep(
    problem: Problem,
    divergence_weight: Tensor,
    labels: Tensor | None,
    label_weight: Tensor | None,
    wants: tuple[bool, bool, bool],
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
    wide = torch.float64 if vocabulary <= NARROW else dtype
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
            value, gradient = _divergence(z_s[part].to(wide), z_t[part].to(wide), p.divergence, p.beta)
            sums[0] += value.to(dtype).dot(divergence_weight[of_all])
            gradient = gradient.to(dtype).mul_(divergence_weight[of_all, None])
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
    log_beta, log_rest = (log_ratio.new_tensor(math.log(x)) for x in (beta, 1.0 - beta))
    over_teacher = torch.logaddexp(log_ratio + log_rest, log_beta)  # log(M / P_t)
    over_student = torch.logaddexp(log_beta - log_ratio, log_rest)
    of_student = torch.linalg.vecdot(p_s, over_student)
    value = (beta - 1.0) * of_student - beta * torch.linalg.vecdot(p_t, over_teacher)
    return value, over_student.sub_(of_student[:, None]).mul_(p_s).mul_(beta - 1.0)


def _cross_entropy(z: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of cross entropies, and its gradient in the logits `z`."""
    labels = labels.masked_fill(weight == 0, 0)[:, None]
    log_p = z.log_softmax(-1)
    value = -log_p.gather(1, labels)[:, 0].dot(weight)
    gradient = log_p.exp_().mul_(weight[:, None])
    return value, gradient.scatter_add_(1, labels, -weight[:, None])
