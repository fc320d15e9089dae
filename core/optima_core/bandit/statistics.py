"""Discounted count, sum and sum of squares of each arm's rewards, and what is read off them.

Every round all three are multiplied by gamma, then the pulled arm adds (1, r, r**2). Rewards are stored relative to the
bandit's first one: sum of squares minus squared sum loses its digits when all rewards share a large offset.
"""

import torch
from torch import Tensor

from optima_core.bandit.policy import State

# The count of an arm that is never pulled decays into denormal numbers, whose arithmetic is slow and whose quotients are
# noise. Below this it is forgotten.
FORGOTTEN = 1e-12


def init_statistics(batch: int, arms: int, device: torch.device) -> State:
    """`count`, `total`, `square` float64 [batch, arms], and `origin` [batch, 1], the reward they are relative to."""
    zeros = torch.zeros(batch, arms, dtype=torch.float64, device=device)
    return {"origin": zeros[:, :1].clone(), "count": zeros, "total": zeros.clone(), "square": zeros.clone()}


def relative_to_origin(state: State, reward: Tensor) -> tuple[Tensor, Tensor]:
    """`reward` [batch, 1] minus the origin, and the origin, which the first reward sets."""
    nothing_seen = state["count"].sum(dim=-1, keepdim=True) == 0
    origin = torch.where(nothing_seen, reward, state["origin"])
    return reward - origin, origin


def observe(state: State, pulled: Tensor, reward: Tensor, gamma: float) -> State:
    """The statistics after one round: `pulled` bool [batch, arms], `reward` float64 [batch, 1]."""
    centred, origin = relative_to_origin(state, reward)
    weight = pulled.to(torch.float64)
    count = gamma * state["count"] + weight
    kept = count > FORGOTTEN
    return {
        "origin": origin,
        "count": torch.where(kept, count, 0.0),
        "total": torch.where(kept, gamma * state["total"] + weight * centred, 0.0),
        "square": torch.where(kept, gamma * state["square"] + weight * centred**2, 0.0),
    }


def pooled_mean(state: State) -> Tensor:
    """Mean of all rewards, relative to the origin, [batch, 1]; 0 when none was seen."""
    return state["total"].sum(dim=-1, keepdim=True) / state["count"].sum(dim=-1, keepdim=True).clamp(min=FORGOTTEN)


def pooled_sigma(state: State) -> Tensor:
    """Standard deviation of rewards about their own arm's mean, pooled over the arms, [batch, 1].

    sigma**2 = sum_k (Q_k - S_k**2 / N_k) / sum_k N_k
    """
    within = (state["square"] - state["total"] ** 2 / state["count"].clamp(min=FORGOTTEN)).clamp(min=0.0)
    return torch.sqrt(within.sum(dim=-1, keepdim=True) / state["count"].sum(dim=-1, keepdim=True).clamp(min=FORGOTTEN))


def shrunk_mean(state: State, prior_count: float) -> Tensor:
    """Mean reward of each arm, drawn towards the pooled one by `prior_count` rewards' worth, [batch, arms]."""
    return (state["total"] + prior_count * pooled_mean(state)) / (state["count"] + prior_count)
