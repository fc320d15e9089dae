"""How a fused loss becomes an operator of torch.

A fused loss computes a scalar and, while the tiles are at hand, what its backward pass needs. `FusedOperator` registers
it through `torch.library`, so that `torch.compile(fullgraph=True)`, `opcheck` and CUDA graphs see one opaque operator
with a fake kernel and a backward. Such an operator costs tens of microseconds a call more than the function itself, so
eager calls go through an equivalent `autograd.Function` instead.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

Outputs = Sequence[Tensor]
Sizes = tuple[int | None, ...]

_always_operators = False


@contextlib.contextmanager
def as_operators() -> Iterator[None]:
    """While entered, every loss is one operator of torch, as in a compiled graph, rather than what it is made of.

    On fake tensors an operator computes shapes alone: what it returns and keeps, and none of its inner steps.
    """
    global _always_operators
    before, _always_operators = _always_operators, True
    try:
        yield
    finally:
        _always_operators = before


class FusedOperator:
    """`forward` as `optima_kernels::<name>`, and as an `autograd.Function` for eager calls.

    `forward` takes tensors, lists of tensors and options, and returns a flat sequence of tensors. `setup_context` is
    that of an `autograd.Function`; so is `backward`, after a first argument: whether it is traced into a graph, to be
    handed to `multiply` and to the operators it calls. It returns a gradient, or a list of them, for each argument.
    Second derivatives are an error.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Outputs],
        fake: Callable[..., Outputs],
        setup_context: Callable[[Any, Sequence[Any], Outputs], None],
        backward: Callable[..., Sequence[Any]],
    ) -> None:
        def operator_backward(ctx: Any, *d_outputs: Any) -> Any:
            return tuple(backward(True, ctx, *(d_outputs[0] if isinstance(d_outputs[0], list) else d_outputs)))

        self.operator = torch.library.custom_op(f"optima_kernels::{name}", forward, mutates_args=())
        self.operator.register_fake(fake)
        self.operator.register_autograd(operator_backward, setup_context=setup_context)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(sizes: Sizes, *flat: Any) -> tuple[Tensor, ...]:
                return tuple(forward(*_nested(sizes, flat)))

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
                ctx.sizes = inputs[0]
                setup_context(ctx, _nested(inputs[0], inputs[1:]), output)

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
                return None, *_flat(ctx.sizes, backward(False, ctx, *d_outputs))

        # torch asks for the signature at every call, and inspect would make it anew.
        Function.forward.__signature__ = inspect.signature(Function.forward)  # type: ignore[attr-defined]
        self.function = Function

    def __call__(self, *arguments: Any, in_graph: bool | None = None) -> Outputs:
        """`forward(*arguments)`; whether it is being traced is asked of torch when not given."""
        if in_graph is None:
            in_graph = torch.compiler.is_compiling() or _always_operators
        if in_graph:
            return cast(Outputs, self.operator(*arguments))
        sizes = tuple(len(x) if isinstance(x, list) else None for x in arguments)
        return cast(Outputs, self.function.apply(sizes, *_flat(sizes, arguments)))  # type: ignore[no-untyped-call]


def _flat(sizes: Sizes, arguments: Sequence[Any]) -> list[Any]:
    """Lists spread out, since an `autograd.Function` only sees tensors that are arguments themselves."""
    flat: list[Any] = []
    for size, argument in zip(sizes, arguments, strict=True):
        flat.extend([argument] if size is None else [None] * size if argument is None else argument)
    return flat


def _nested(sizes: Sizes, flat: Sequence[Any]) -> list[Any]:
    rest = iter(flat)
    return [next(rest) if size is None else list(islice(rest, size)) for size in sizes]


def multiply(saved: Tensor, factor: Tensor, in_graph: bool, dtype: torch.dtype | None = None) -> Tensor:
    """`saved * factor` in `dtype` or else that of `saved`; `factor` is 0-d, or has the dimensions of `saved`.

    It is made in the memory of `saved` where the dtype is the same, unless a second backward pass may come to read it.
    Of that autograd alone knows; AOTAutograd asks it by the same call before it donates buffers. `saved` is an output
    that never leaves this package, so that nobody else sees it change. A factor of 1 on a CPU leaves nothing to do.
    """
    dtype = saved.dtype if dtype is None else dtype
    if saved.dim() > 0 and factor.dim() == 0:
        factor = factor.reshape(1)  # a 0-d factor would first be rounded to the dtype of `saved`
    if in_graph:
        return (saved * factor).to(dtype)
    may_be_read_again = torch._C._autograd._get_current_graph_task_keep_graph()
    if may_be_read_again or dtype != saved.dtype:
        return torch.mul(saved, factor, out=torch.empty_like(saved, dtype=dtype))
    return saved if _all_one(factor) else torch.mul(saved, factor, out=saved)


def _all_one(factor: Tensor) -> bool:
    """Whether factors are 1, as far as that can be seen without waiting: on a CPU, and not in a trace."""
    return factor.device.type == "cpu" and not isinstance(factor, FakeTensor) and bool((factor == 1).all())
