"""Activation checkpointing: layers that keep their input alone, and run again in the backward pass."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
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
    return checkpoint(forward, *arguments, use_reentrant=False, **named)
