"""Count, sum and sum of squares of each arm's rewards, what is read off them, and the beliefs built on them.

Rewards are stored relative to the bandit's first one: sum of squares minus squared sum loses its digits when all
rewards share a large offset.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optima_core.bandit.catalogue import GAMMA, PRIOR_COUNT
from optima_core.bandit.policy import ArmPolicy, State, hyper_parameter

# The count of an arm that is never pulled decays into denormal numbers, whose arithmetic is slow and whose
# quotients are noise. Below this it is forgotten.
FORGOTTEN = 1e-12


def relative_to_origin(state: State, reward: Tensor) -> tuple[Tensor, Tensor]:
    """`reward` [batch, 1] minus the origin, and the origin [batch, 1], which the first reward sets."""
    nothing_seen = state["count"].sum(dim=-1, keepdim=True) == 0
    origin = torch.where(nothing_seen, reward, state["origin"])
    return reward - origin, origin


def pooled_mean(state: State) -> Tensor:
    """Mean of all rewards, relative to the origin, [batch, 1]; 0 when none was seen."""
    return state["total"].sum(dim=-1, keepdim=True) / state["count"].sum(dim=-1, keepdim=True).clamp(min=FORGOTTEN)


def pooled_sigma(state: State) -> Tensor:
    """Standard deviation of rewards about their own arm's mean, pooled over the arms, [batch, 1].

    sigma**2 = sum_k (Q_k - S_k**2 / N_k) / sum_k N_k
    """
    within = (state["square"] - state["total"] ** 2 / state["count"].clamp(min=FORGOTTEN)).clamp(min=0.0)
    return torch.sqrt(within.sum(dim=-1, keepdim=True) / state["count"].sum(dim=-1, keepdim=True).clamp(min=FORGOTTEN))


def total_sigma(state: State) -> Tensor:
    """Standard deviation of all rewards about their common mean, [batch, 1]."""
    count = state["count"].sum(dim=-1, keepdim=True).clamp(min=FORGOTTEN)
    return torch.sqrt((state["square"].sum(dim=-1, keepdim=True) / count - pooled_mean(state) ** 2).clamp(min=0.0))


@dataclass(frozen=True, kw_only=True)
class Belief(ArmPolicy):
    """Estimates from count N, sum S and sum of squares Q of each arm, whichever rewards these hold.

    With m the pooled mean, sigma the pooled spread within arms and n_0 the prior's worth in rewards:

        mean_k = (S_k + n_0 m) / (N_k + n_0)        std_k = sigma / sqrt(N_k + n_0)
    """

    prior_count: float = hyper_parameter(PRIOR_COUNT)

    def init_belief(self, batch: int, device: torch.device) -> State:
        def zeros(width: int) -> Tensor:
            return torch.zeros(batch, width, dtype=torch.float64, device=device)

        return {"origin": zeros(1), "count": zeros(self.arms), "total": zeros(self.arms), "square": zeros(self.arms)}

    def posterior(self, state: State) -> tuple[Tensor, Tensor]:
        count = state["count"] + self.prior_count
        mean = state["origin"] + (state["total"] + self.prior_count * pooled_mean(state)) / count
        return mean, pooled_sigma(state) / torch.sqrt(count)


@dataclass(frozen=True, kw_only=True)
class DiscountedBelief(Belief):
    """N, S and Q are multiplied by gamma every round, then the pulled arm adds (1, r, r**2)."""

    gamma: float = hyper_parameter(GAMMA)

    def learn(self, state: State, pulled: Tensor, reward: Tensor) -> State:
        centred, origin = relative_to_origin(state, reward)
        weight = pulled.to(torch.float64)
        count = self.gamma * state["count"] + weight
        kept = count > FORGOTTEN
        return {
            "origin": origin,
            "count": torch.where(kept, count, 0.0),
            "total": torch.where(kept, self.gamma * state["total"] + weight * centred, 0.0),
            "square": torch.where(kept, self.gamma * state["square"] + weight * centred**2, 0.0),
        }
