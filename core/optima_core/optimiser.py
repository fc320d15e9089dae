"""AdamW with weight decay on matrices alone, and the learning-rate schedule: warm-up, then a fall to the end."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from optima_core.config import OptimiserConfig
from optima_core.errors import OptimaError
from optima_core.shards import local


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; gains, biases and scalars do not."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimiser(
    parameters: Iterable[nn.Parameter], config: OptimiserConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """The optimiser and its schedule over `steps` optimiser steps.

    Raises OptimaError if apex is asked for and cannot be imported.
    """
    groups = decay_groups(parameters, config.weight_decay)
    betas = (config.beta1, config.beta2)
    optimiser: torch.optim.Optimizer
    if config.implementation == "apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError as error:
            raise OptimaError(
                f"optimiser.implementation apex needs NVIDIA's apex, built from its sources for this torch ({error}); "
                "take adamw, torch's own fused AdamW"
            ) from error
        optimiser = FusedAdam(groups, lr=config.learning_rate, betas=betas, adam_w_mode=True)
    else:
        optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    warmup = max(1, round(config.warmup * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        falls = {"cosine": (1 - math.cos(math.pi * progress)) / 2, "linear": progress, "constant": 0.0}
        return 1 - (1 - config.final) * falls[config.schedule]

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


@contextlib.contextmanager
def still_behind_gates(
    optimiser: torch.optim.Optimizer, gated: Sequence[tuple[Tensor, Sequence[nn.Parameter]]]
) -> Iterator[None]:
    """Around an optimiser's step: parameters whose gate (0-d, 1 or 0) is 0 stay as they are, and so does their state.

    A closed gate makes gradients of zero, on which AdamW would still go on along its momentum, decay weights and
    moments, and count a step; a module that is not tapped has no gradient, and nothing of it moves. This makes both
    the same, with nothing read on the host: the step is taken, and undone where the gate is 0.
    """
    before = [_tensors_of_step(optimiser, parameters) for _, parameters in gated]
    kept = [torch._foreach_mul(tensors, 1 - gate) for tensors, (gate, _) in zip(before, gated, strict=True)]
    yield
    for (gate, parameters), existed, old in zip(gated, before, kept, strict=True):
        torch._foreach_mul_(_tensors_of_step(optimiser, parameters), gate)
        torch._foreach_add_(existed, list(old))


def _tensors_of_step(optimiser: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """What a step changes, without autograd: the parameters, and the tensors of their state."""
    found = [p.detach() for p in parameters]
    for parameter in parameters:
        found += [x for x in optimiser.state.get(parameter, {}).values() if isinstance(x, Tensor)]
    return [local(x) for x in found]


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scales all gradients so that their joint L2 norm is at most `limit`; without reading the norm on the host."""
    if limit > 0:
        nn.utils.clip_grad_norm_(parameters, limit)
