"""`linear_kl` from torch calls over blocks of tokens.

Both models' logits of a block of tokens are made in two scratch buffers. A few rows at a time, still in cache, the
student's turn into the gradient of the loss in them, which two matrix products then spend on the gradients of state
and head. So the forward pass does the four products of the usual way (and no more: making the logits again in the
backward pass would add 55 % at widths 512 and 768), and it keeps nothing but those gradients.

With labels there are two losses, whose incoming gradients are only known in the backward pass, and a gradient of the
head for each would double the memory. So the forward pass keeps nothing, and the backward pass makes the logits again.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optima_kernels.dispatch import compute_dtype
from optima_kernels.registration import FusedOperator, multiply

# A block of tokens has about this many logits of each model (32 MB of float32), but not fewer tokens than BLOCK_TOKENS,
# below which the products are bound by reading the heads.
BLOCK_ELEMENTS = 2**23
BLOCK_TOKENS = 192
# The rows worked on together have about this many logits of each model: 2 MB of float32.
CACHED_ELEMENTS = 2**19


class Problem(NamedTuple):
    """The tensors of one call, with tokens flat: `h` [T, D], `w` [V, D], `bias` [V]."""

    h_s: Tensor
    w_s: Tensor
    bias_s: Tensor | None
    h_t: Tensor
    w_t: Tensor
    bias_t: Tensor | None
    temperature: float
    divergence: str
    beta: float

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(*(x for x in self[:6] if x is not None))


class Gradients(NamedTuple):
    """Gradients of the student's state, head and bias; empty where not wanted. The last two in the compute dtype."""

    state: Tensor
    head: Tensor
    bias: Tensor

    @classmethod
    def empty(cls, problem: Problem, wants: tuple[bool, bool, bool]) -> "Gradients":
        h_s, w_s, dtype = problem.h_s, problem.w_s, problem.dtype
        shapes = (h_s.shape, w_s.shape, w_s.shape[:1])
        dtypes = (h_s.dtype, dtype, dtype)
        return cls(*(h_s.new_empty(s if w else 0, dtype=d) for s, d, w in zip(shapes, dtypes, wants, strict=True)))


def _sweep(
    problem: Problem,
    divergence_weight: Tensor,
    labels: Tensor | None,
    label_weight: Tensor | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """Over all tokens: the weighted sums [2] of divergence (at that temperature) and cross entropy (at 1), and the
    gradients of `temperature * divergence + cross entropy`. Tokens whose weights [T] are 0 may hold anything.
    """
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


def _forward(
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    token_weight: Tensor,
    wants_state: bool,
    wants_head: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients without the factor `temperature` / T.

    float16 could not hold the gradient of the state with that factor, and a loss scale comes too late.
    """
    problem = Problem(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, divergence, beta)
    with torch.autocast(h_s.device.type, enabled=False):
        sums, gradients = _sweep(problem, token_weight, None, None, (wants_state, wants_head, wants_bias))
    return sums[0] * (temperature**2 / max(h_s.shape[0], 1)), *gradients


def _fake(
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    token_weight: Tensor,
    wants_state: bool,
    wants_head: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, divergence, beta)
    return h_s.new_empty((), dtype=problem.dtype), *Gradients.empty(problem, (wants_state, wants_head, wants_bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h_s, w_s, bias_s = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype if wanted else None for x, wanted in zip((h_s, w_s, bias_s), inputs[10:], strict=True)]
    ctx.scale = inputs[6] / max(h_s.shape[0], 1)


def _backward(in_graph: bool, ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = [
        None if d_loss is None or dtype is None else multiply(gradient, d_loss * ctx.scale, in_graph).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return *gradients, *[None] * 10


linear_kl = FusedOperator("linear_kl_blocked", _forward, _fake, _setup_context, _backward)


def _forward_with_labels(
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    token_weight: Tensor,
    wants_state: bool,
    wants_head: bool,
    wants_bias: bool,
    labels: Tensor,
    label_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    problem = Problem(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, divergence, beta)
    with torch.autocast(h_s.device.type, enabled=False):
        sums, _ = _sweep(problem, token_weight, labels, label_weight, (False, False, False))
    tokens = max(h_s.shape[0], 1)
    return sums[0] * (temperature**2 / tokens), sums[1] / tokens


def _fake_with_labels(h_s: Tensor, w_s: Tensor, bias_s: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype = Problem(h_s, w_s, bias_s, *arguments[:6]).dtype
    return h_s.new_empty((), dtype=dtype), h_s.new_empty((), dtype=dtype)


def _setup_context_with_labels(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], inputs[9], *inputs[13:])
    ctx.options, ctx.wants = inputs[6:9], inputs[10:13]


def _backward_with_labels(
    in_graph: bool, ctx: Any, d_divergence: Tensor, d_cross_entropy: Tensor
) -> tuple[Tensor | None, ...]:
    *tensors, token_weight, labels, label_weight = ctx.saved_tensors
    tokens = max(labels.shape[0], 1)
    gradients = _gradients_with_labels(
        *tensors,
        *ctx.options,
        token_weight * (d_divergence * (ctx.options[0] / tokens)),
        labels,
        label_weight * (d_cross_entropy / tokens),
        *ctx.wants,
        in_graph=in_graph,
    )
    return *(g if wanted else None for g, wanted in zip(gradients, ctx.wants, strict=True)), *[None] * 12


def _forward_gradients(
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    token_weight: Tensor,
    labels: Tensor,
    label_weight: Tensor,
    wants_state: bool,
    wants_head: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, divergence, beta)
    with torch.autocast(h_s.device.type, enabled=False):
        _, gradients = _sweep(problem, token_weight, labels, label_weight, (wants_state, wants_head, wants_bias))
    return (
        gradients.state,
        gradients.head.to(w_s.dtype),
        gradients.bias.to(w_s.dtype if bias_s is None else bias_s.dtype),
    )


def _fake_gradients(h_s: Tensor, w_s: Tensor, bias_s: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    gradients = Gradients.empty(Problem(h_s, w_s, bias_s, *arguments[:6]), arguments[-3:])
    return (
        gradients.state,
        gradients.head.to(w_s.dtype),
        gradients.bias.to(w_s.dtype if bias_s is None else bias_s.dtype),
    )


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(in_graph: bool, ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("linear_kl has no second derivatives")


_gradients_with_labels = FusedOperator(
    "linear_kl_with_labels_gradients_blocked", _forward_gradients, _fake_gradients, _no_context, _no_second_derivative
)
linear_kl_with_labels = FusedOperator(
    "linear_kl_with_labels_blocked",
    _forward_with_labels,
    _fake_with_labels,
    _setup_context_with_labels,
    _backward_with_labels,
)
