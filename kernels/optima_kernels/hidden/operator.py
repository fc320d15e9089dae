"""`hidden_mses` as an operator of torch: lists of tensors in, the losses and every gradient out.

torch gives gradients to a list of tensors, not to one that holds None besides. So a list of what layers may lack is
either all None, or has an empty tensor where there is none.
"""

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from optima_kernels.hidden import blocked
from optima_kernels.hidden.problem import Layer, Options, Solution
from optima_kernels.shared.dispatch import compute_dtype
from optima_kernels.shared.registration import FusedOperator, multiply


def _layers(
    h_s: Sequence[Tensor],
    h_t: Sequence[Tensor],
    weight: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    token_weight: Sequence[Tensor | None],
    wants: Sequence[bool],
    operands: torch.dtype | None,
    backend: str,
    gate: Tensor | None,
) -> list[Layer]:
    """What a backend gets: operands of a product in the dtype that autocast asks for, float64 excepted.

    The gradient of a bfloat16 weight is summed in its own memory where one product of the vendor's makes it.
    """
    layers = []
    wanted = zip(wants[::3], wants[1::3], wants[2::3], strict=True)
    optional = ([x if x is None or x.numel() else None for x in xs] for xs in (weight, bias, token_weight))
    for state, teacher, w, b, counts, each in zip(h_s, h_t, *optional, wanted, strict=True):
        sums = compute_dtype(*(x for x in (state, teacher, w, b) if x is not None))
        one_product = backend == "triton" and gate is None and w is not None
        narrow = one_product and state.dtype == w.dtype == torch.bfloat16
        if operands is not None and w is not None and torch.float64 not in (state.dtype, w.dtype):
            state, w = state.to(operands), w.to(operands)
        layers.append(Layer(state, teacher, w, b, counts, each, torch.bfloat16 if narrow else sums))
    return layers


def _forward(
    h_s: Sequence[Tensor],
    h_t: Sequence[Tensor],
    weight: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    token_weight: Sequence[Tensor | None],
    wants: Sequence[bool],
    operands: torch.dtype | None,
    normalize: str | None,
    backend: str,
    gate: Tensor | None,
) -> list[Tensor]:
    """The losses [L], not yet multiplied by the gate, and three gradients a layer."""
    layers = _layers(h_s, h_t, weight, bias, token_weight, wants, operands, backend, gate)
    with torch.autocast(h_s[0].device.type, enabled=False):
        solutions = _solver(backend)(layers, Options(normalize), gate)
    return [torch.stack([x.loss for x in solutions]), *_gradients(solutions)]


@cache
def _solver(backend: str) -> Any:
    if backend == "blocked":
        return blocked.solve
    from optima_kernels.hidden import triton

    return triton.solve


def _gradients(solutions: Sequence[Solution]) -> list[Tensor]:
    return list(chain.from_iterable(x[1:] for x in solutions))


def _fake(
    h_s: Sequence[Tensor],
    h_t: Sequence[Tensor],
    weight: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    token_weight: Sequence[Tensor | None],
    wants: Sequence[bool],
    operands: torch.dtype | None,
    normalize: str | None,
    backend: str,
    gate: Tensor | None,
) -> list[Tensor]:
    layers = _layers(h_s, h_t, weight, bias, token_weight, wants, operands, backend, gate)
    solutions = [layer.empty_solution() for layer in layers]
    return [torch.stack([x.loss for x in solutions]), *_gradients(solutions)]


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    h_s, h_t, weight, bias, _, wants = inputs[:6]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.wants, ctx.backend = wants, inputs[8]
    ctx.dtypes = [None if x is None else x.dtype for x in chain.from_iterable(zip(h_s, weight, bias, strict=True))]
    ctx.given = [xs[0] is not None for xs in inputs[:5]]
    stored = [state.dtype for state in output[1::3]]
    ctx.scales = [
        2.0 / max(teacher.numel(), 1) if dtype == torch.float16 else 1.0
        for teacher, dtype in zip(h_t, stored, strict=True)
    ]


def _backward(in_graph: bool, ctx: Any, d_losses: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    gradients: list[Tensor | None] = [None] * len(ctx.wants)
    if d_losses is not None:
        traced = in_graph or torch._C._functorch.maybe_get_level(d_losses) >= 0
        if ctx.backend == "triton" and not traced:
            _scale_together(gradients, ctx, d_losses)
        else:
            for i, saved in enumerate(ctx.saved_tensors):
                if ctx.wants[i]:
                    factor = d_losses[i // 3] * ctx.scales[i // 3]
                    gradients[i] = multiply(saved, factor, traced, ctx.dtypes[i])
    none: list[None] = [None] * len(ctx.scales)
    lists = (gradients[::3], none, gradients[1::3], gradients[2::3], none)
    return *(xs if given else None for xs, given in zip(lists, ctx.given, strict=True)), *[None] * 5


def _scale_together(gradients: list[Tensor | None], ctx: Any, d_losses: Tensor) -> None:
    """Fills `gradients`, those of one size and dtype in one launch."""
    from optima_kernels.shared.scaling import scaled

    all_saved = ctx.saved_tensors
    keep = torch._C._autograd._get_current_graph_task_keep_graph()  # another backward pass may come to read them
    for kind in range(3):
        wanted = [i for i in range(kind, len(ctx.wants), 3) if ctx.wants[i]]
        saved, dtypes = [all_saved[i] for i in wanted], [ctx.dtypes[i] for i in wanted]
        found = scaled(saved, [i // 3 for i in wanted], d_losses, ctx.scales, dtypes, keep)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient


def without_gaps(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A list of what layers may lack as the operator takes it."""
    given = next((x for x in xs if x is not None), None)
    if given is None or all(x is not None for x in xs):
        return list(xs)
    return [given.new_empty(0) if x is None else x for x in xs]


hidden_mses_operator = FusedOperator("hidden_mses", _forward, _fake, _setup_context, _backward)
