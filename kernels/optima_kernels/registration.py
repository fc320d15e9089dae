"""How a fused loss becomes an operator of torch.

A fused loss computes a scalar and, while the tiles are at hand, what its backward needs. `fused_loss` registers that
function through `torch.library`, so that `torch.compile(fullgraph=True)`, `opcheck` and CUDA graphs see one opaque
operator with a fake kernel and a backward. Such an operator costs tens of microseconds a call more than the function
itself, so eager calls go through an equivalent `autograd.Function` instead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Multiply = Callable[[Tensor, Tensor], Tensor]


def fused_loss(
    name: str,
    forward: Callable[..., Outputs],
    fake: Callable[..., Outputs],
    setup_context: Callable[[Any, tuple[Any, ...], Outputs], None],
    backward: Callable[..., Any],
) -> Callable[..., Outputs]:
    """The callable for `forward`, registered as `optima_kernels::<name>` with `fake` and `backward`.

    `setup_context` is that of an `autograd.Function`; so is `backward`, after a first argument: the function that
    multiplies what the forward pass saved by an incoming gradient.
    """
    operator = torch.library.custom_op(f"optima_kernels::{name}", forward, mutates_args=())
    operator.register_fake(fake)
    operator.register_autograd(partial(backward, torch.mul), setup_context=setup_context)
    methods = {"forward": forward, "setup_context": setup_context, "backward": partial(backward, _spend)}
    eager = type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})

    def call(*arguments: Any) -> Outputs:
        outputs: Outputs = operator(*arguments) if torch.compiler.is_compiling() else eager.apply(*arguments)
        return outputs

    return call


def _spend(saved: Tensor, factor: Tensor) -> Tensor:
    """`saved * factor`, in the memory of `saved` unless a second backward pass may come to read it.

    Of that autograd alone knows; AOTAutograd asks it by the same call before it donates buffers. `saved` is an output
    that never leaves this package, so that nobody else sees it change.
    """
    if type(saved) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        return saved * factor
    return saved.mul_(factor)
