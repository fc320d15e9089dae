"""Exponential weights: no assumption on how rewards come about."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optima_core.bandit.catalogue import ALPHA, ETA
from optima_core.bandit.policy import State, draw_arm, hyper_parameter
from optima_core.bandit.statistics import DiscountedBelief, pooled_mean, total_sigma


@dataclass(frozen=True, kw_only=True)
class Exp3S(DiscountedBelief):
    """EXP3.S: arms are drawn with probabilities from exponential weights that leak into each other.

        p_k = (1 - eta) w_k / sum_j w_j + eta / K
        w_k <- w_k exp(eta x_k / (K p_k)) + e alpha / K sum_j w_j,    x_k = the reward in [0, 1] if k was pulled, else 0

    Every arm has probability eta / K at least.

    Source: Auer, Cesa-Bianchi, Freund, Schapire, "The nonstochastic multiarmed bandit problem", SIAM J. Comput. 32
    (2002); used for curricula by Graves et al., arXiv 1704.03003. Ours: with discounted mean m and standard deviation
    s of all rewards, a reward r is put into [0, 1] as x = 1/2 + (r - m) / (4 s), clipped.
    """

    eta: float = hyper_parameter(ETA)
    alpha: float = hyper_parameter(ALPHA)

    def init_belief(self, batch: int, device: torch.device) -> State:
        log_weight = torch.zeros(batch, self.arms, dtype=torch.float64, device=device)
        return super().init_belief(batch, device) | {"log_weight": log_weight}

    def probability(self, state: State) -> Tensor:
        """Of each arm to be pulled next, float64 [batch, arms]."""
        return (1.0 - self.eta) * torch.softmax(state["log_weight"], dim=-1) + self.eta / self.arms

    def choose(self, state: State) -> Tensor:
        return draw_arm(state, self.probability(state))

    def learn(self, state: State, pulled: Tensor, reward: Tensor) -> State:
        statistics = super().learn(state, pulled, reward)
        spread = total_sigma(statistics).clamp(min=torch.finfo(torch.float64).tiny)
        deviation = (reward - statistics["origin"] - pooled_mean(statistics)) / spread
        unit_reward = (0.5 + 0.25 * deviation).clamp(0.0, 1.0)
        estimate = torch.where(pulled, unit_reward / self.probability(state), 0.0)
        log_weight = state["log_weight"] + self.eta / self.arms * estimate
        # The leak may be 0, whose logarithm Python refuses.
        leak = math.log(math.e * self.alpha / self.arms) if self.alpha > 0 else -math.inf
        log_weight = torch.logaddexp(log_weight, leak + torch.logsumexp(state["log_weight"], dim=-1, keepdim=True))
        return statistics | {"log_weight": log_weight - torch.logsumexp(log_weight, dim=-1, keepdim=True)}
