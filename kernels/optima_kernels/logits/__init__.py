"""Vocabulary distillation: how far the student's token distribution is from the teacher's.

With a vocabulary of 50 thousand and 2 thousand tokens one logits matrix is 400 MB, and the usual way makes about five
of that size. `linear_kl` takes the hidden states and the heads instead and only ever holds tiles of logits.
`prediction_kl` is for heads whose logits are small enough to exist: a few answers, or a few thousand.

The gradients are made in the forward pass, while the logits are there, and the backward pass only multiplies them.
With labels there are two losses. If the caller says what the cross entropy weighs beside the divergence, that holds for
their sum, too. Else their incoming gradients are only known in the backward pass, and the logits are made again there.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from optima_kernels import reference
from optima_kernels.logits import operator
from optima_kernels.logits.predictions import LEAST_ELEMENTS, PredictionDivergence
from optima_kernels.shared.checks import (
    check_choice,
    check_device,
    check_floating,
    check_gate,
    check_mask,
    check_sample_weight,
    check_shape,
)
from optima_kernels.shared.dispatch import Backend, autocast_dtype, choose_backend, compute_dtype
from optima_kernels.shared.gates import apply_gate
from optima_kernels.shared.variants import logits_variant

DIVERGENCES = ("forward", "reverse", "jsd")


@overload
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
    labels: None = None,
    label_weight: float | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
    budget_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
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
    labels: Tensor,
    label_weight: float | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
    budget_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


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
    label_weight: float | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
    budget_bytes: int | None = None,
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

    With labels there is also the cross entropy of the same student logits at T = 1, averaged over the tokens that
    `mask` keeps and whose label is not `ignore_index`, and times `gate`.

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
        labels: int64 [...], one a token, each in [0, V) or `ignore_index`.
        label_weight: what the cross entropy counts beside the divergence, at least 0, if that is known before the
            backward pass. It saves making all logits a second time; see Returns.
        ignore_index: the label of a token that has none.
        mask: bool, broadcastable to [...]; True counts. What a masked token holds does not matter.
        gate: 0-d tensor that multiplies every returned loss; where it is 0, losses and gradients are 0 and no work is
            done, on a CPU or by the triton backend.
        budget_bytes: what the logits of both models may take at a time; as many tokens are worked on together, at
            least one. By default what the backend does best with: `chunk_tokens` in `logits.triton`, and blocks of
            `BLOCK_ELEMENTS` in `logits.blocked`. Less memory costs time: on a GPU the gradient of the head is read and
            written once for every chunk.
        backend: "reference", "blocked" or "triton"; by default triton on CUDA and blocked elsewhere. float64 runs on
            blocked.

    Under autocast states and heads are taken in its dtype, as `torch.nn.functional.linear` would. The triton backend
    stores the logits of bfloat16 states in bfloat16, like eager torch, those of others in float32. Everything else is
    computed in float32, on blocked also the logits.

    Returns:
        The loss; with labels `(loss, cross_entropy)`; with labels and a `label_weight` `(loss, cross_entropy)`, too,
        where the loss is `divergence + label_weight * cross_entropy`, and its cross entropy is to look at: it carries
        no gradient. Scalars, float64 if any floating argument is, float32 otherwise. Sums are kept in that dtype; each
        gradient has the dtype of its argument.

    Raises:
        ValueError: a shape (unequal vocabularies among them), device or option does not fit.
        TypeError: a tensor has the wrong kind of dtype.
    """
    _check_heads(h_s, w_s, h_t, w_t, bias_s, bias_t)
    tokens = h_s.shape[:-1]
    check_device(h_s, labels=labels, mask=mask, gate=gate)
    if labels is not None:
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, not {labels.dtype}")
        check_shape("labels", labels, tokens, "the tokens of h_s")
    check_mask(mask, tokens)
    check_gate(gate)
    _check_options(temperature, divergence, beta)
    _check_extras(labels, label_weight, budget_bytes)
    if labels is not None:
        labels = labels.masked_fill(labels == ignore_index, -1)
    variant = partial(
        logits_variant,
        h_s,
        w_s,
        divergence=divergence,
        bias=bias_s is not None,
        labels="none" if labels is None else "apart" if label_weight is None else "weighted",
        gate=gate,
        operands=autocast_dtype(h_s),
    )
    chosen = _backend(backend, variant, h_s, w_s, h_t, w_t, bias_s, bias_t)
    heads = {"h_s": h_s, "w_s": w_s, "h_t": h_t, "w_t": w_t, "bias_s": bias_s, "bias_t": bias_t}
    if chosen == "reference":
        return _by_reference(heads, temperature, divergence, beta, labels, label_weight, mask, gate)

    counts = None if mask is None else mask.expand(tokens).flatten()
    if labels is not None:
        labels = labels.flatten() if counts is None else labels.flatten().masked_fill(~counts, -1)
    student = [h_s.flatten(0, -2), w_s, bias_s]
    teacher = [h_t.flatten(0, -2), w_t, bias_t]
    arguments: tuple[Any, ...] = (
        [x for x in student if x is not None],
        [x.detach() for x in teacher if x is not None],
        [counts, labels, None],
        gate,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student],
        autocast_dtype(h_s),
        float(temperature),
        divergence,
        float(beta),
        0.0 if label_weight is None else float(label_weight),
        budget_bytes,
        chosen,
    )
    if labels is not None and label_weight is None:
        losses = operator.losses_apart(*arguments)
        return apply_gate(losses[0], gate), apply_gate(losses[1], gate)
    loss, cross_entropy, *_ = operator.solve(*arguments)
    if labels is None:
        return apply_gate(loss, gate)
    return apply_gate(loss, gate), apply_gate(cross_entropy, gate)


def _check_heads(
    h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, bias_s: Tensor | None, bias_t: Tensor | None
) -> None:
    check_floating(h_s, h_s=h_s, w_s=w_s, h_t=h_t, w_t=w_t, bias_s=bias_s, bias_t=bias_t)
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


def _check_extras(labels: Tensor | None, label_weight: float | None, budget_bytes: int | None) -> None:
    if label_weight is not None:
        if labels is None:
            raise ValueError(f"label_weight={label_weight} needs labels, which are None")
        if not 0 <= label_weight < math.inf:
            raise ValueError(f"label_weight must be finite and at least 0, not {label_weight}")
    if budget_bytes is not None and not budget_bytes > 0:
        raise ValueError(f"budget_bytes must be positive, not {budget_bytes}")


def _backend(backend: str | None, variant: Callable[[], str], *heads: Tensor | None) -> Backend:
    """What `choose_backend` says; float64 is not for Triton's kernels."""
    tensors = [x for x in heads if x is not None]
    wide = compute_dtype(*tensors) == torch.float64
    chosen = choose_backend("blocked" if backend is None and wide else backend, tensors[0], "linear_kl", variant)
    if chosen == "triton" and wide:
        raise ValueError('backend="triton" takes float32, bfloat16 and float16, not float64; use backend="blocked"')
    return chosen


def _by_reference(
    heads: dict[str, Any],
    temperature: float,
    divergence: str,
    beta: float,
    labels: Tensor | None,
    label_weight: float | None,
    mask: Tensor | None,
    gate: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    operands = autocast_dtype(heads["h_s"])
    if operands is not None:
        for name in ("h_s", "w_s", "h_t", "w_t"):
            heads[name] = heads[name] if heads[name].dtype == torch.float64 else heads[name].to(operands)
    with torch.autocast(heads["h_s"].device.type, enabled=False):
        losses = reference.linear_kl(
            **heads,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            labels=labels,
            ignore_index=-1,
            mask=mask,
            gate=gate,
        )
    if isinstance(losses, Tensor) or label_weight is None:
        return losses
    return losses[0] + label_weight * losses[1], losses[1].detach()


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
    shows in a step. On a CPU, uncompiled, the forward pass makes the gradient in fewer passes over the logits than
    autograd would take; there it has no second derivative.

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
    if torch.compiler.is_compiling() or z_s.device.type != "cpu" or z_s.numel() < LEAST_ELEMENTS:
        return reference.prediction_kl(
            z_s,
            z_t,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            sample_weight=sample_weight,
            gate=gate,
        )
    dtype = compute_dtype(z_s, z_t)
    rows = z_s[..., 0].numel()
    if sample_weight is None:
        weight = z_s.new_full((rows,), 1.0 / rows, dtype=dtype)
    else:
        weight = sample_weight.detach().to(dtype).repeat_interleave(z_s[0, ..., 0].numel())
        total = weight.sum()
        weight = weight / torch.where(total == 0, 1, total)
    logits = (z.to(dtype).flatten(0, -2) if z.dim() > 1 else z.to(dtype)[None] for z in (z_s, z_t.detach()))
    loss, _ = PredictionDivergence.apply(*logits, weight, temperature, divergence, beta)  # type: ignore[no-untyped-call]
    return apply_gate(loss, gate)


def _check_options(temperature: float, divergence: str, beta: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    check_choice("divergence", divergence, DIVERGENCES)
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f'beta must lie strictly between 0 and 1, not be {beta}; the limits are divergence="forward" (beta to 0) '
            'and divergence="reverse" (beta to 1)'
        )
