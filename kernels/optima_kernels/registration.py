"""How a fused loss becomes an operator of torch.

A fused loss computes a scalar and, while the tiles are at hand, what its backward pass needs. `FusedOperator` registers
it through `torch.library`, so that `torch.compile(fullgraph=True)`, `opcheck` and CUDA graphs see one opaque operator
with a fake kernel and a backward. Such an operator costs tens of microseconds a call more than the function itself, so
eager calls go through an equivalent `autograd.Function` instead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Outputs = tuple[Tensor, ...]


class FusedOperator:
    """`forward` as `optima_kernels::<name>`, and as an `autograd.Function` for eager calls.

    `setup_context` is that of an `autograd.Function`; so is `backward`, after a first argument: whether it is traced
    into a graph, to be handed to `multiply` and to the operators it calls. Second derivatives are an error.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Outputs],
        fake: Callable[..., Outputs],
        setup_context: Callable[[Any, tuple[Any, ...], Outputs], None],
        backward: Callable[..., Any],
    ) -> None:
        self.operator = torch.library.custom_op(f"optima_kernels::{name}", forward, mutates_args=())
        self.operator.register_fake(fake)
        self.operator.register_autograd(partial(backward, True), setup_context=setup_context)
        methods = {
            "forward": forward,
            "setup_context": setup_context,
            "backward": once_differentiable(partial(backward, False)),
        }
        self.function = type(
            name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()}
        )

    def __call__(self, *arguments: Any, in_graph: bool | None = None) -> Outputs:
        """`forward(*arguments)`; whether it is being traced is asked of torch when not given."""
        traced = torch.compiler.is_compiling() if in_graph is None else in_graph
        outputs: Outputs = self.operator(*arguments) if traced else self.function.apply(*arguments)
        return outputs


def multiply(saved: Tensor, factor: Tensor, in_graph: bool) -> Tensor:
    """`saved * factor`, in the memory of `saved` unless a second backward pass may come to read it.

    Of that autograd alone knows; AOTAutograd asks it by the same call before it donates buffers. `saved` is an output
    that never leaves this package, so that nobody else sees it change.
    """
    if in_graph or torch._C._autograd._get_current_graph_task_keep_graph():
        return saved * factor
    return saved.mul_(factor)
