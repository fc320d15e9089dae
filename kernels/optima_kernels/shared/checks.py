"""What the public losses check about their arguments, once, before any backend runs.

Every error names the argument, says what was given and what would be right. Only shapes, dtypes and devices are
looked at, never a tensor's value.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optima_kernels.shared.layers import PerLayer


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def check_floating(like: Tensor, **tensors: Tensor | None) -> None:
    """Floating point, on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
        check_device(like, **{name: tensor})


def check_device(like: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like the other tensors, not on {tensor.device}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tensor.shape != torch.Size(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({meaning}), not {tuple(tensor.shape)}")


def check_mask(mask: Tensor | None, tokens: torch.Size) -> None:
    """Bool, broadcastable to the shape of the tokens."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True counts), not {mask.dtype}")
    broadcasts = mask.dim() <= len(tokens) and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(tokens), strict=False)
    )
    if not broadcasts:
        raise ValueError(
            f"mask must broadcast to the tokens' shape {tuple(tokens)}, not have shape {tuple(mask.shape)}"
        )


def check_sample_weight(sample_weight: Tensor | None, leading: torch.Size) -> None:
    if sample_weight is None:
        return
    if not leading:
        raise ValueError("sample_weight needs a batch dimension: the student tensor has only a feature dimension")
    check_shape("sample_weight", sample_weight, leading[:1], "one weight a sample")


def check_gate(gate: Tensor | None, layers: int | None = None) -> None:
    """0-d for one loss, [layers] for the losses of several."""
    if gate is None:
        return
    expected = () if layers is None else (layers,)
    if tuple(gate.shape) != expected:
        raise ValueError(f"gate must have shape {expected}, one entry a loss, not {tuple(gate.shape)}")


def check_layers(layers: int, *, like: str = "h_s", **arguments: PerLayer) -> None:
    """Every argument that is a sequence has an entry for each of `layers` layers, as many as argument `like` has."""
    if layers == 0:
        raise ValueError(f"{like} must hold at least one layer, not none")
    for name, argument in arguments.items():
        if argument is not None and not isinstance(argument, Tensor) and len(argument) != layers:
            raise ValueError(f"{name} must have {layers} entries, one a layer like {like}, not {len(argument)}")
