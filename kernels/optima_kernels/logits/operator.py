"""`linear_kl` as operators of torch.

`solve` returns a loss and, made in the same pass, the gradients that its backward pass multiplies. With labels whose
weight is not known there are two losses, whose incoming gradients only the backward pass knows, and a gradient of the
head for each would double the memory: then `losses_apart` keeps nothing, and its backward pass solves again.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optima_kernels.logits import blocked
from optima_kernels.logits.problem import Layer, Options, Solution
from optima_kernels.shared.registration import FusedOperator, multiply


def _layer(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor | None],
    operands: torch.dtype | None,
) -> Layer:
    """States and heads in the dtype that autocast asks for, float64 excepted."""
    heads: list[Tensor | None] = []
    for h, w, *bias in (student, teacher):
        narrow = [x if operands is None or x.dtype == torch.float64 else x.to(operands) for x in (h, w)]
        heads += [*narrow, bias[0] if bias else None]
    return Layer(*heads, *tokens)  # type: ignore[arg-type]


def _head_dtype(student: Sequence[Tensor], backend: str) -> torch.dtype | None:
    """A bfloat16 gradient is made in its own memory by Triton's backend, whose few chunks add few roundings to it."""
    return torch.bfloat16 if backend == "triton" and student[1].dtype == torch.bfloat16 else None


@cache
def _solver(backend: str) -> Any:
    if backend == "blocked":
        return blocked.solve
    from optima_kernels.logits import triton

    return triton.solve


def _solved(layer: Layer, options: Options, backend: str, gate: Tensor | None) -> Solution:
    with torch.autocast(layer.h_s.device.type, enabled=False):
        solution: Solution = _solver(backend)([layer], options, None if gate is None else gate.reshape(1))[0]
    return solution


def _forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor | None],
    gate: Tensor | None,
    wants: Sequence[bool],
    operands: torch.dtype | None,
    temperature: float,
    divergence: str,
    beta: float,
    label_weight: float,
    budget_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, its cross entropy, and a `Solution`'s scale and gradients.

    `student` and `teacher` are state, head and, if there is one, bias; `tokens` are counts, labels and factors, see
    `Layer`.
    """
    wanted = (wants[0], wants[1], wants[2])
    head_dtype = _head_dtype(student, backend)
    options = Options(temperature, divergence, beta, label_weight, wanted, head_dtype, budget_bytes)
    losses, *rest = _solved(_layer(student, teacher, tokens, operands), options, backend, gate)
    of_divergence, of_labels = losses.clone().unbind()
    total = of_divergence if tokens[1] is None else of_divergence + label_weight * of_labels
    return total.clone(), of_labels.clone(), rest[0], rest[1], rest[2], rest[3]


def _fake(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor | None],
    gate: Tensor | None,
    wants: Sequence[bool],
    operands: torch.dtype | None,
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head_dtype = _head_dtype(student, options_and_backend[-1])
    options = Options(1.0, "forward", 0.5, 0.0, (wants[0], wants[1], wants[2]), head_dtype)
    losses, scale, state, head, bias = Solution.empty(_layer(student, teacher, tokens, operands), options)
    return losses.new_empty(()), losses.new_empty(()), scale, state, head, bias


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [x.dtype if wanted else None for x, wanted in zip(inputs[0], inputs[4], strict=False)]
    ctx.others = [_no_gradient(argument) for argument in inputs[1:]]
    ctx.backend = inputs[-1]


def _backward(in_graph: bool, ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    scale, *gradients = ctx.saved_tensors
    of_student = [
        None if d_loss is None or dtype is None else _scaled(gradient, d_loss * scale, in_graph, dtype, ctx.backend)
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=False)
    ]
    return of_student, *ctx.others


def _scaled(saved: Tensor, factor: Tensor, in_graph: bool, dtype: torch.dtype, backend: str) -> Tensor:
    """`saved * factor` in `dtype`; see `multiply`, and `scaling` for why not by torch."""
    traced = in_graph or torch._C._functorch.maybe_get_level(factor) >= 0
    if backend != "triton" or traced:
        return multiply(saved, factor, traced, dtype)
    from optima_kernels.shared.scaling import scale_into

    may_be_read_again = torch._C._autograd._get_current_graph_task_keep_graph()
    out = torch.empty_like(saved, dtype=dtype) if may_be_read_again or dtype != saved.dtype else saved
    scale_into([out], [saved], factor.reshape(1))
    return out


def _no_gradient(argument: Any) -> list[None] | None:
    """As torch asks for it: of a list, if that is one of tensors alone, a list."""
    is_tensors = isinstance(argument, list) and all(isinstance(x, Tensor) for x in argument)
    return [None] * len(argument) if is_tensors else None


solve = FusedOperator("linear_kl", _forward, _fake, _setup_context, _backward)


def _forward_apart(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor | None],
    gate: Tensor | None,
    wants: Sequence[bool],
    operands: torch.dtype | None,
    temperature: float,
    divergence: str,
    beta: float,
    label_weight: float,
    budget_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy; arguments as those of `_forward`."""
    options = Options(temperature, divergence, beta, label_weight, (False, False, False), None, budget_bytes)
    of_divergence, of_labels = _solved(_layer(student, teacher, tokens, operands), options, backend, gate).losses
    return of_divergence.clone(), of_labels.clone()


def _fake_apart(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake(*arguments)[:2]


def _setup_context_apart(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    student, teacher, tokens, gate, *ctx.options = inputs
    ctx.heads = len(student)
    ctx.save_for_backward(*student, *teacher, *tokens, gate)
    ctx.others = [_no_gradient(argument) for argument in inputs[1:]]


def _backward_apart(in_graph: bool, ctx: Any, d_divergence: Tensor, d_cross_entropy: Tensor) -> tuple[Any, ...]:
    *heads, counts, labels, _, gate = ctx.saved_tensors
    student, teacher = heads[: ctx.heads], heads[ctx.heads :]
    factors = torch.stack([d_divergence, d_cross_entropy])
    _, _, scale, *gradients = solve(student, teacher, [counts, labels, factors], gate, *ctx.options, in_graph=in_graph)
    of_student = [
        _scaled(gradient, scale, in_graph, x.dtype, ctx.options[-1]) if wanted else None
        for gradient, x, wanted in zip(gradients, student, ctx.options[0], strict=False)
    ]
    return of_student, *ctx.others


losses_apart = FusedOperator(
    "linear_kl_losses_apart", _forward_apart, _fake_apart, _setup_context_apart, _backward_apart
)
