"""AdamW with weight decay on matrices alone, and the learning-rate schedule: warm-up, then a cosine down to zero."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and its schedule.

    Attributes:
        learning_rate: Peak learning rate, reached at the end of the warm-up.
        warmup: Share of all steps in which the learning rate rises linearly from zero, 0 to 1.
        final: Learning rate at the last step, as a share of the peak.
        weight_decay: Decoupled weight decay of tensors with two or more dimensions.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        clip: Gradients are scaled down to this global L2 norm; 0 leaves them as they are.
    """

    learning_rate: float = 2e-3
    warmup: float = 0.05
    final: float = 0.0
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("learning_rate", 0.0, math.inf),
            ("warmup", 0.0, 1.0),
            ("final", 0.0, math.inf),
            ("weight_decay", 0.0, math.inf),
            ("beta1", 0.0, 1.0),
            ("beta2", 0.0, 1.0),
            ("clip", 0.0, math.inf),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {getattr(self, name)}")


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; gains, biases and scalars do not."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimiser(
    parameters: Iterable[nn.Parameter], config: OptimiserConfig, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimiser and its schedule over `steps` optimiser steps."""
    optimiser = torch.optim.AdamW(
        decay_groups(parameters, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    warmup = max(1, round(config.warmup * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scales all gradients so that their joint L2 norm is at most `limit`; without reading the norm on the host."""
    if limit > 0:
        nn.utils.clip_grad_norm_(parameters, limit)
