"""Other ways of weighing layer losses, for `python -m bench.choosing`: what `engine.balance gradient` is compared with.

Each takes the place of an objective's total, and distils all modules in every round. A part is what the engine takes it
for: the hidden-state losses of a module, or its attention-map losses, each the mean over the module's layers.
"""

from typing import Any

import torch
from torch import Tensor

from optima_core.objective import Forward, Losses, Objective
from optima_core.step import ModelForward
from optima_core.taps import LayerTap, WantedTaps

Parts = dict[str, Tensor]
"""Losses by name: "task", "logits", then "kind/module"; 0-d."""


class Weighing:
    """Predictions at weight 1 and every part at weight 1; the others differ from it."""

    def __init__(self, objective: Objective, steps_per_round: int) -> None:
        self.objective = objective
        self.steps_per_round = steps_per_round

    def total(self, losses: Losses) -> Tensor:
        """What a step goes down."""
        predictions: Parts = {}
        layers: Parts = {}
        for group, values in losses.items():
            if group.module is None:
                predictions[group.kind] = values
            else:
                name = f"{group.kind}/{group.module}"
                mean = values.sum() / self.objective.pairs[group.module].student_layers
                layers[name] = layers[name] + mean if name in layers else mean
        return self.weigh(predictions, layers)

    def weigh(self, predictions: Parts, layers: Parts) -> Tensor:
        return torch.stack([*predictions.values(), *layers.values()]).sum()

    @staticmethod
    def shown(teacher: ModelForward[Any], probe: object, wanted: WantedTaps) -> ModelForward[Any]:
        """What the teacher shows, as the losses are to see it."""
        return teacher


class LossRatio(Weighing):
    """Each part counts half of what the predictions do, by its value: a ratio of losses behind a stopped gradient."""

    def weigh(self, predictions: Parts, layers: Parts) -> Tensor:
        predicted = torch.stack(list(predictions.values())).sum()
        shares = [value / value.detach().clamp(min=1e-12) for value in layers.values()]
        return predicted + 0.5 * predicted.detach() * torch.stack(shares).sum()


class UncertaintyWeighting(Weighing):
    """Kendall, Gal and Cipolla, arXiv 1705.07115: the sum of exp(-s) L + s, with a learned s a loss.

    Adam learns each s, from 0, at a rate of 0.05: at the student's own, 0.002, none would arrive in 300 steps where a
    layer loss of 0.003 puts it, near -6.
    """

    def __init__(self, objective: Objective, steps_per_round: int) -> None:
        super().__init__(objective, steps_per_round)
        self.variances: dict[str, Tensor] = {}
        self.optimiser: torch.optim.Adam | None = None

    def weigh(self, predictions: Parts, layers: Parts) -> Tensor:
        losses = predictions | layers
        if self.optimiser is None:
            self.variances = {name: torch.zeros((), requires_grad=True) for name in losses}
            self.optimiser = torch.optim.Adam(self.variances.values(), lr=0.05)
        else:  # The gradients of the step before are there by now.
            self.optimiser.step()
            self.optimiser.zero_grad()
        return torch.stack([torch.exp(-s) * losses[name] + s for name, s in self.variances.items()]).sum()


class DynamicWeightAverage(Weighing):
    """Liu, Johns and Davison, arXiv 1803.10704: K softmax(r / 2), r the ratio of a loss's last two means of a round."""

    def __init__(self, objective: Objective, steps_per_round: int) -> None:
        super().__init__(objective, steps_per_round)
        self.seen: list[Tensor] = []
        self.means: list[Tensor] = []

    def weigh(self, predictions: Parts, layers: Parts) -> Tensor:
        values = torch.stack([*predictions.values(), *layers.values()])
        if len(self.seen) == self.steps_per_round:
            self.means.append(torch.stack(self.seen).mean(dim=0))
            self.seen = []
        self.seen.append(values.detach())
        ratios = self.means[-1] / self.means[-2] if len(self.means) > 1 else torch.ones_like(values)
        return (len(values) * torch.softmax(ratios.detach() / 2, dim=0) * values).sum()


class StandardisedTargets(Weighing):
    """Every channel of the teacher's hidden states to mean 0 and variance 1, as found on the probe; parts at weight 1.

    Maps, which sum to 1 as they are, count by the value that they have in the first step.
    """

    def __init__(self, objective: Objective, steps_per_round: int) -> None:
        super().__init__(objective, steps_per_round)
        self.first: Parts = {}

    def weigh(self, predictions: Parts, layers: Parts) -> Tensor:
        maps = {name: value for name, value in layers.items() if name.startswith("attention/")}
        if not self.first:
            self.first = {name: value.detach().clamp(min=1e-12) for name, value in maps.items()}
        scaled = layers | {name: value / self.first[name] for name, value in maps.items()}
        return super().weigh(predictions, scaled)

    @staticmethod
    def shown(teacher: ModelForward[Any], probe: object, wanted: WantedTaps) -> ModelForward[Any]:
        with torch.no_grad():
            taps = teacher(probe, wanted).taps
        scales = {
            (name, layer): (tap.hidden.mean(dim=(0, 1)), tap.hidden.std(dim=(0, 1)).clamp(min=1e-6))
            for name, layers in wanted.items()
            for layer, tap in zip(layers, taps[name], strict=True)
        }

        def standardised(batch: object, asked: WantedTaps) -> Forward:
            found = teacher(batch, asked)
            taps: dict[str, tuple[LayerTap, ...]] = {}
            for name, layers in asked.items():
                pairs = zip(layers, found.taps[name], strict=True)
                taps[name] = tuple(
                    tap._replace(hidden=(tap.hidden - scales[name, layer][0]) / scales[name, layer][1])
                    for layer, tap in pairs
                )
            return found._replace(taps=taps)

        return standardised


WEIGHINGS: dict[str, type[Weighing]] = {
    "loss_ratio": LossRatio,
    "uncertainty_weighting": UncertaintyWeighting,
    "dynamic_weight_average": DynamicWeightAverage,
    "standardised_targets": StandardisedTargets,
}
