"""What a gate does to a loss, and which gates the host can see closed."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def apply_gate(loss: Tensor, gate: Tensor | None) -> Tensor:
    """`gate * loss`, and exactly 0 with a zero gradient where the gate is 0, whatever the loss is there."""
    return loss if gate is None else torch.where(gate == 0, 0, loss * gate.to(loss.dtype))


def closed_gates(gate: Tensor | None, losses: int) -> list[bool]:
    """Which gates of `losses` losses are 0, as far as that can be seen without waiting: on a CPU, and not in a trace.

    The Triton kernels see it themselves.
    """
    if gate is None or gate.device.type != "cpu" or isinstance(gate, FakeTensor):
        return [False] * losses
    return [value == 0 for value in gate.flatten().tolist()]
