"""What a bandit must beat, and what it cannot.

The uniform policy is the headline baseline: "no method beats stratified sampling consistently" (arXiv 2411.05735).
All of these keep the discounted statistics of `DiscountedBelief`, for display; only `EpsilonGreedy` acts on them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optima_core.bandit.catalogue import ARM, EPSILON
from optima_core.bandit.policy import AdaptivePolicy, State, draw_arm, hyper_parameter
from optima_core.bandit.statistics import DiscountedBelief
from optima_core.rng import uniform


@dataclass(frozen=True, kw_only=True)
class EpsilonGreedy(DiscountedBelief, AdaptivePolicy):
    """With probability epsilon any arm, else the one with the largest |mean_k|.

    Source: Matiisen et al., "Teacher-student curriculum learning", arXiv 1707.00183; a loss that rises fast asks for
    attention as one that falls fast does, hence the absolute value. Their mean forgets per pull, ours per round.
    """

    epsilon: float = hyper_parameter(EPSILON)

    def choose(self, state: State) -> Tensor:
        mean, _ = self.posterior(state)
        explores = uniform(state["key"][:, 0], state["round"], stream=1) < self.epsilon
        return torch.where(explores, draw_arm(state, torch.full_like(mean, 1.0 / self.arms)), mean.abs().argmax(dim=-1))


@dataclass(frozen=True, kw_only=True)
class Uniform(DiscountedBelief):
    """Any arm with equal probability."""

    def choose(self, state: State) -> Tensor:
        return draw_arm(state, torch.full_like(state["count"], 1.0 / self.arms))


@dataclass(frozen=True, kw_only=True)
class RoundRobin(DiscountedBelief):
    """The arms in turn."""

    def choose(self, state: State) -> Tensor:
        return state["round"] % self.arms


@dataclass(frozen=True, kw_only=True)
class FixedArm(DiscountedBelief):
    """Always the same arm."""

    arm: int = hyper_parameter(ARM)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arm >= self.arms:
            raise ValueError(f"arm must be in [0, {self.arms - 1}] with {self.arms} arms, got {self.arm}")

    def choose(self, state: State) -> Tensor:
        return torch.full_like(state["round"], self.arm)


@dataclass(frozen=True, kw_only=True)
class AllModules(DiscountedBelief):
    """Every module in every round, as distillation without a bandit does: arm -1, every strength 1.

    Its reward counts for every arm.
    """

    def choose(self, state: State) -> Tensor:
        return torch.full_like(state["round"], -1)

    def learn(self, state: State, pulled: Tensor, reward: Tensor) -> State:
        return super().learn(state, torch.ones_like(pulled), reward)
