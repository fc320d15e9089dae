"""Vocabulary distillation: how far the student's token distribution is from the teacher's.

With a vocabulary of 50 thousand and 2 thousand tokens one logits matrix is 400 MB, and the usual way makes about five
of that size. `linear_kl` takes the hidden states and the heads instead and only ever holds tiles of logits.
`prediction_kl` is for heads whose logits are small enough to exist: a few answers, or a few thousand.

The gradients are made in the forward pass, while the logits are there, and the backward pass only multiplies them.
With labels there are two losses, whose incoming gradients are only known in the backward pass, and a gradient of the
head for each would double the memory: then the forward pass keeps nothing, and the backward makes the logits again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optima_kernels import reference
from optima_kernels.logits import blocked
from optima_kernels.logits.problem import Gradients, Problem
from optima_kernels.shared.checks import (
    check_choice,
    check_device,
    check_floating,
    check_gate,
    check_mask,
    check_sample_weight,
    check_shape,
)
from optima_kernels.shared.dispatch import choose_backend, compute_dtype
from optima_kernels.shared.gates import apply_gate, closed_gates
from optima_kernels.shared.registration import FusedOperator, multiply
from optima_kernels.shared.tokens import token_weight

DIVERGENCES = ("forward", "reverse", "jsd")


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divergence between token distributions given as hidden states and heads, without a logits matrix in memory.

    With `z = h w^T + bias`, `P_t = softmax(z_t / T)` and `P_s = softmax(z_s / T)` the loss is `gate * T^2` times the
    mean, over the tokens that `mask` keeps (0 when there is none), of one of

    - `"forward"`: `KL(P_t || P_s)`, what Hinton et al. (2015) distil with;
    - `"reverse"`: `KL(P_s || P_t)`;
    - `"jsd"`: `beta KL(P_t || M) + (1 - beta) KL(P_s || M)`, `M = beta P_t + (1 - beta) P_s`, the generalised
      Jensen-Shannon divergence of GKD (Agarwal et al., arXiv 2306.13649). It vanishes at both ends of beta; divided by
      `beta` it tends to forward as beta goes to 0, divided by `1 - beta` to reverse as beta goes to 1.

    Args:
        h_s: student state [..., D_s], usually [tokens, D_s]. Gets a gradient.
        w_s: student head [V, D_s]. Gets a gradient.
        h_t: teacher state [..., D_t]. Never gets a gradient, nor do `w_t` and `bias_t`.
        w_t: teacher head [V, D_t], of the same vocabulary.
        bias_s: [V]. Gets a gradient.
        bias_t: [V].
        temperature: T > 0.
        divergence: "forward", "reverse" or "jsd".
        beta: strictly between 0 and 1, only read by "jsd".
        labels: int64 [...], one a token, each in [0, V) or `ignore_index`. Adds the cross entropy of the same student
            logits at T = 1, averaged over tokens that `mask` keeps and whose label is not `ignore_index`.
        ignore_index: the label of a token that has none.
        mask: bool, broadcastable to [...]; True counts. What a masked token holds does not matter.
        gate: 0-d tensor that multiplies every returned loss; where it is 0, losses and gradients are 0 and no work is
            done, on a CPU or by the triton backend.
        backend: "reference", "blocked" or "triton"; by default triton on CUDA and blocked elsewhere. float64 runs on
            blocked.

    Returns:
        The loss, or `(loss, cross_entropy)` when labels are given: scalars, float64 if any floating argument
        is, float32 otherwise. Sums are kept in that dtype, also under autocast; each gradient has the dtype of its
        argument.

    Raises:
        ValueError: a shape (unequal vocabularies among them), device or option does not fit.
        TypeError: a tensor has the wrong kind of dtype.
    """
    check_floating(h_s, h_s=h_s, w_s=w_s, h_t=h_t, w_t=w_t, bias_s=bias_s, bias_t=bias_t)
    check_device(h_s, labels=labels, mask=mask, gate=gate)
    for name, h in (("h_s", h_s), ("h_t", h_t)):
        if h.dim() == 0:
            raise ValueError(f"{name} must have a feature dimension, not be 0-d")
    for name, w in (("w_s", w_s), ("w_t", w_t)):
        if w.dim() != 2:
            raise ValueError(f"{name} must be [V, D], not have shape {tuple(w.shape)}")
    for name, x in (("h_s", h_s), ("w_s", w_s), ("h_t", h_t), ("w_t", w_t)):
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, but has shape {tuple(x.shape)}")
    vocabulary, tokens = w_s.shape[0], h_s.shape[:-1]
    if w_t.shape[0] != vocabulary:
        raise ValueError(
            f"w_t must have as many rows as w_s, {vocabulary}, not {w_t.shape[0]}: a divergence is only "
            "defined between distributions over the same vocabulary"
        )
    check_shape("w_s", w_s, (vocabulary, h_s.shape[-1]), "[V, D_s]")
    check_shape("h_t", h_t, (*tokens, w_t.shape[1]), "the tokens of h_s, the width of w_t")
    for name, bias in (("bias_s", bias_s), ("bias_t", bias_t)):
        if bias is not None:
            check_shape(name, bias, (vocabulary,), "[V]")
    if labels is not None:
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, not {labels.dtype}")
        check_shape("labels", labels, tokens, "the tokens of h_s")
    check_mask(mask, tokens)
    check_gate(gate)
    _check_options(temperature, divergence, beta)
    chosen = choose_backend(backend, h_s, "linear_kl")
    if chosen == "reference":
        return reference.linear_kl(
            h_s,
            w_s,
            h_t,
            w_t,
            bias_s=bias_s,
            bias_t=bias_t,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            labels=labels,
            ignore_index=ignore_index,
            mask=mask,
            gate=gate,
        )
    dtype = compute_dtype(*(x for x in (h_s, w_s, h_t, w_t, bias_s, bias_t) if x is not None))
    problem = (
        h_s.flatten(0, -2),
        w_s,
        bias_s,
        *(None if x is None else x.detach() for x in (h_t.flatten(0, -2), w_t, bias_t)),
        float(temperature),
        divergence,
        float(beta),
        chosen,
        gate,
        _token_weight(h_s, mask, dtype),
        *(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (h_s, w_s, bias_s)),
    )
    if labels is None:
        return apply_gate(_linear_kl(*problem)[0], gate)
    counted = labels != ignore_index if mask is None else (labels != ignore_index) & mask
    losses = _linear_kl_with_labels(*problem, labels.flatten(), _token_weight(h_s, counted, dtype))
    return apply_gate(losses[0], gate), apply_gate(losses[1], gate)


def _token_weight(h: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = token_weight(h.shape[:-1], mask, None, dtype)
    return h.new_ones(h.shape[:-1].numel(), dtype=dtype) if weight is None else weight


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
    """The loss of `linear_kl` on given logits, for answer sets that are small (VQA, NLVR2, SNLI-VE).

    It is plain torch on every device: at the 3129 answers of VQA and 256 questions the logits are 3 MB, the whole
    loss is a handful of launches that `torch.compile` fuses into two, and a kernel of our own would save nothing that
    shows in a step.

    Args:
        z_s: student logits [..., V]. Gets a gradient.
        z_t: teacher logits [..., V]. Never gets one.
        temperature, divergence, beta: as in `linear_kl`.
        sample_weight: [B], B being the first dimension: the loss is the weighted mean over rows, 0 when the weights sum
            to 0.
        gate: 0-d tensor that multiplies the loss.

    Returns:
        A scalar, float64 if any floating argument is, float32 otherwise.

    Raises:
        ValueError: a shape (unequal vocabularies among them), device or option does not fit.
        TypeError: a tensor has the wrong kind of dtype.
    """
    check_floating(z_s, z_s=z_s, z_t=z_t, sample_weight=sample_weight)
    check_device(z_s, gate=gate)
    if z_s.dim() == 0:
        raise ValueError("z_s must be [..., V], not 0-d")
    check_shape("z_t", z_t, z_s.shape, "that of z_s: the same rows over the same answers")
    check_sample_weight(sample_weight, z_s.shape[:-1])
    check_gate(gate)
    _check_options(temperature, divergence, beta)
    return reference.prediction_kl(
        z_s,
        z_t,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        sample_weight=sample_weight,
        gate=gate,
    )


def _check_options(temperature: float, divergence: str, beta: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    check_choice("divergence", divergence, DIVERGENCES)
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f'beta must lie strictly between 0 and 1, not be {beta}; the limits are divergence="forward" (beta to 0) '
            'and divergence="reverse" (beta to 1)'
        )


def _sweep(
    backend: str,
    problem: Problem,
    divergence_weight: Tensor,
    labels: Tensor | None,
    label_weight: Tensor | None,
    wants: tuple[bool, bool, bool],
    gate: Tensor | None,
) -> tuple[Tensor, Gradients]:
    """See `logits_problem`."""
    arguments = (divergence_weight, labels, label_weight, wants)
    with torch.autocast(problem.h_s.device.type, enabled=False):
        if backend == "triton" and problem.dtype != torch.float64:
            from optima_kernels.logits import triton

            return triton.sweep(problem, *arguments, gate)
        if closed_gates(gate, 1)[0]:
            gradients = Gradients(*(x.zero_() for x in Gradients.empty(problem, wants)))
            return problem.h_s.new_zeros(2, dtype=problem.dtype), gradients
        return blocked.sweep(problem, *arguments)


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
    backend: str,
    gate: Tensor | None,
    token_weight: Tensor,
    wants_state: bool,
    wants_head: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients without the factor `temperature` / T.

    float16 could not hold the gradient of the state with that factor, and a loss scale comes too late.
    """
    problem = Problem(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, divergence, beta)
    sums, gradients = _sweep(backend, problem, token_weight, None, None, (wants_state, wants_head, wants_bias), gate)
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
    backend: str,
    gate: Tensor | None,
    token_weight: Tensor,
    wants_state: bool,
    wants_head: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, divergence, beta)
    return h_s.new_empty((), dtype=problem.dtype), *Gradients.empty(problem, (wants_state, wants_head, wants_bias))


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    h_s, w_s, bias_s = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype if wanted else None for x, wanted in zip((h_s, w_s, bias_s), inputs[12:], strict=True)]
    ctx.scale = inputs[6] / max(h_s.shape[0], 1)


def _backward(in_graph: bool, ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = [
        None if d_loss is None or dtype is None else multiply(gradient, d_loss * ctx.scale, in_graph).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return *gradients, *[None] * 12


_linear_kl = FusedOperator("linear_kl", _forward, _fake, _setup_context, _backward)


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
    backend: str,
    gate: Tensor | None,
    token_weight: Tensor,
    wants_state: bool,
    wants_head: bool,
    wants_bias: bool,
    labels: Tensor,
    label_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    problem = Problem(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, divergence, beta)
    sums, _ = _sweep(backend, problem, token_weight, labels, label_weight, (False, False, False), gate)
    tokens = max(h_s.shape[0], 1)
    return sums[0] * (temperature**2 / tokens), sums[1] / tokens


def _fake_with_labels(h_s: Tensor, w_s: Tensor, bias_s: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype = Problem(h_s, w_s, bias_s, *arguments[:6]).dtype
    return h_s.new_empty((), dtype=dtype), h_s.new_empty((), dtype=dtype)


def _setup_context_with_labels(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *inputs[10:12], *inputs[15:])
    ctx.options, ctx.wants = inputs[6:10], inputs[12:15]


def _backward_with_labels(
    in_graph: bool, ctx: Any, d_divergence: Tensor, d_cross_entropy: Tensor
) -> tuple[Tensor | None, ...]:
    *tensors, gate, token_weight, labels, label_weight = ctx.saved_tensors
    tokens = max(labels.shape[0], 1)
    gradients = _gradients_with_labels(
        *tensors,
        *ctx.options,
        gate,
        token_weight * (d_divergence * (ctx.options[0] / tokens)),
        labels,
        label_weight * (d_cross_entropy / tokens),
        *ctx.wants,
        in_graph=in_graph,
    )
    return *(g if wanted else None for g, wanted in zip(gradients, ctx.wants, strict=True)), *[None] * 14


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
    backend: str,
    gate: Tensor | None,
    token_weight: Tensor,
    labels: Tensor,
    label_weight: Tensor,
    wants_state: bool,
    wants_head: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, divergence, beta)
    wants = (wants_state, wants_head, wants_bias)
    _, gradients = _sweep(backend, problem, token_weight, labels, label_weight, wants, gate)
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


def _no_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    pass


def _no_second_derivative(in_graph: bool, ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("linear_kl has no second derivatives")


_gradients_with_labels = FusedOperator(
    "linear_kl_with_labels_gradients", _forward_gradients, _fake_gradients, _no_context, _no_second_derivative
)
_linear_kl_with_labels = FusedOperator(
    "linear_kl_with_labels",
    _forward_with_labels,
    _fake_with_labels,
    _setup_context_with_labels,
    _backward_with_labels,
)
