"""Upper confidence bounds: pull the arm that could be the best."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optima_core.bandit.catalogue import WIDTH
from optima_core.bandit.policy import AdaptivePolicy, State, hyper_parameter
from optima_core.bandit.statistics import DiscountedBelief


@dataclass(frozen=True, kw_only=True)
class DiscountedUCB(DiscountedBelief, AdaptivePolicy):
    """Discounted UCB with a bonus in units of the estimated noise; as good as Thompson sampling in our simulations.

        index_k = mean_k + width sigma sqrt(log(sum_j N_j) / (N_k + n_0))

    Source: Garivier and Moulines, arXiv 0805.3415, whose bonus is 2 B sqrt(xi log n / N_k) for rewards in [0, B].
    Ours: sigma in the place of B, because the bound on a loss decrement is unknown and far above its noise.
    """

    width: float = hyper_parameter(WIDTH)

    def choose(self, state: State) -> Tensor:
        mean, std = self.posterior(state)
        horizon = state["count"].sum(dim=-1, keepdim=True).clamp(min=1.0)
        return torch.argmax(mean + self.width * std * torch.sqrt(torch.log(horizon)), dim=-1)
