"""The unit of strength: the weight at which a part of the layer losses pulls as hard at the student as predictions do.

A part is the hidden-state losses of a module, or its attention-map losses.

Balancing losses by the norms of their gradients is GradNorm's idea (Chen et al., arXiv 1711.02257), which learns the
weights; ours are read off: the running geometric mean of `Pull.ratio` at weight 1, which has no hyper-parameter to
tune and no unit, so that one strength serves every task, student and teacher.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class GradientBalance:
    """Keeps the unit of each part. It holds settings only; its memory is a dictionary of tensors.

    smoothing: weight of the past in a unit, per measurement, in [0, 1).
    """

    parts: int
    smoothing: float = 0.7

    def init(self, device: torch.device | str = "cpu") -> State:
        """Before anything was measured: all units are 1."""
        return {
            "log_unit": torch.zeros(self.parts, dtype=torch.float32, device=device),
            "measured": torch.zeros(self.parts, dtype=torch.bool, device=device),
        }

    def observe(self, state: State, part: int, ratio: Tensor) -> State:
        """Takes in a part's `Pull.ratio` at weight 1, 0-d; one that is 0 or not finite tells nothing."""
        here = torch.arange(self.parts, device=ratio.device) == part
        tells = here & (ratio > 0) & torch.isfinite(ratio)
        log_ratio = torch.log(torch.where(tells, ratio, 1.0))
        past = torch.where(state["measured"], self.smoothing, 0.0)
        return {
            "log_unit": torch.where(tells, past * state["log_unit"] + (1 - past) * log_ratio, state["log_unit"]),
            "measured": state["measured"] | tells,
        }

    def units(self, state: State) -> Tensor:
        """float32 [parts]"""
        return torch.exp(state["log_unit"])


def led_by_layers(first: float, last: float, number: int, rounds: int) -> float:
    """What a strength of 1 counts in round `number` of `rounds`, from 0: from `first` to `last` in equal ratios.

    Layers before predictions are TinyBERT's two stages (Jiao et al., arXiv 1909.10351); here one passes into the other.
    Of a single round their geometric mean; after the last round, `last`.
    """
    progress = min(1.0, number / (rounds - 1)) if rounds > 1 else 0.5
    return math.exp((1 - progress) * math.log(first) + progress * math.log(last))
