"""Rows of logits compared by torch calls: a divergence, and its gradient, in one pass forward.

Powers of two, since torch's `exp2` takes a fifth of the time of its `exp` on a CPU, and a third of its softmax. Both
models' rows lie in one tensor, [2, R, V], student first, for fewer calls; and nothing of their size is allocated: what
a few rows need is worked on in the cache again and again.
"""

import math

import torch
from torch import Tensor

from optima_kernels.shared.scratch import Scratch

LOG2E = 1.0 / math.log(2.0)
LN2 = math.log(2.0)
# The rows worked on together have about this many logits of each model, which makes 2 MB of float32.
CACHED_ELEMENTS = 2**17


def compare(
    x: Tensor, weight: Tensor, divergence: str, beta: float, scratch: Scratch, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A value a row [R], and its gradient in the student's logits over temperature [R, V], in `out` if given; both
    times the row's `weight` [R].

    `x` [2, R, V] are logits over temperature, less their row's maximum and times `LOG2E`; their memory is used up, and
    without `out` the gradient lies in that of `scratch`. With u the derivative of the value in P_s, the gradient is
    P_s (u - sum P_s u), for every divergence.

    A divergence is of second order in r = log(P_s / P_t), a sum of terms of first order. So r is a difference of logits
    less one number a row, not of two rounded logarithms; and KL(P_t || P_s) is summed as P_s - P_t - P_t r. There what
    rounding does to a row's factor, in its probabilities and in r, cancels.
    """
    powers = torch.exp2(x, out=scratch.tile("powers", x.shape))
    (p_s, p_t), (over_s, over_t) = powers.unbind(), powers.sum(-1, keepdim=True).reciprocal_().unbind()
    log_sums = (over_t.double() / over_s).log2_().to(x.dtype)
    log_ratio, free = x.unbind()
    log_ratio.sub_(free).sub_(log_sums)  # to base 2
    out, weight = p_s if out is None else out, weight[:, None]
    if divergence == "forward":
        minus_p_t = p_t.mul_(over_t.mul_(-weight))
        gradient = torch.addcmul(minus_p_t, p_s, over_s.mul_(weight), out=out)
        return torch.addcmul(gradient, minus_p_t, log_ratio, value=LN2, out=log_ratio).sum(-1), gradient
    p_s.mul_(over_s)
    p_t.mul_(over_t)
    log_ratio.mul_(LN2)
    if divergence == "reverse":
        weighted = torch.mul(p_s, log_ratio, out=free)
        mean = weighted.sum(-1, keepdim=True)
        value = weighted.sub_(p_s).add_(p_t).sum(-1, keepdim=True).mul_(weight)
        return value[:, 0], torch.mul(log_ratio.sub_(mean), p_s.mul_(weight), out=out)
    log_beta, log_rest = (log_ratio.new_full((), math.log(x)) for x in (beta, 1.0 - beta))
    over_teacher = torch.logaddexp(torch.add(log_ratio, log_rest, out=free), log_beta, out=free)  # log(M / P_t)
    of_teacher = over_teacher.mul_(p_t).sum(-1, keepdim=True)
    over_student = torch.logaddexp(log_ratio.neg_().add_(log_beta), log_rest, out=log_ratio)
    of_student = torch.mul(p_s, over_student, out=free).sum(-1, keepdim=True)
    value = ((beta - 1.0) * of_student - beta * of_teacher) * weight
    return value[:, 0], torch.mul(over_student.sub_(of_student), p_s.mul_(weight * (beta - 1.0)), out=out)
