"""Activation checkpointing: layers that keep their input alone, and run again in the backward pass."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


def recompute_activations(layers: Iterable[nn.Module]) -> None:
    """Makes layers forget what they computed, and compute it again when the backward pass needs it.

    Losses and gradients stay the same (dropout draws the same numbers again). The activations of one layer are alive at
    a time instead of those of all, for about a third more time. What a layer returns, its taps with it, is kept as
    long as the losses need it. Changes the layers in place; weights and their names stay as they are.
    """
    for layer in layers:
        # A bound method, so that a copy of the model, such as its running average, calls its own layers.
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    if torch.compiler.is_compiling():  # a graph holds the kernels it was traced with
        return checkpoint(forward, *arguments, use_reentrant=False, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=_same_attention, **named)


def _same_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a forward pass and its repetition: torch restores autocast, but not the choice of attention kernels.

    `precision.arithmetic` switches some off, and the backward pass runs outside it.
    """
    cuda = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        SDPBackend.MATH: cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    }
    return nullcontext(), _Kernels([kernel for kernel, is_on in enabled.items() if is_on])


class _Kernels(AbstractContextManager[None]):
    """`sdpa_kernel` that can be entered again, for a graph that is gone through backward several times."""

    def __init__(self, kernels: list[SDPBackend]) -> None:
        self.kernels = kernels
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        self._entered.append(sdpa_kernel(self.kernels))
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)
