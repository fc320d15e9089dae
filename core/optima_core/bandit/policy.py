"""What every policy shares: the interface, the clock, the forced pulls, and checked hyper-parameters."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from optima_core.bandit.catalogue import MIN_SHARE, HyperParameter
from optima_core.rng import make_keys, uniform

State = dict[str, Tensor]
"""A bandit's whole memory: named tensors whose first dimension is the batch.

Save it with safetensors, `torch.save` or torch.distributed.checkpoint as it is; slice every tensor alike to take
bandits out of a batch.
"""

# The idleness, in rounds, of an arm that was never pulled: longer than any run.
_ALWAYS = 2**40

_MOST_ARMS = 4096


def hyper_parameter(of: HyperParameter) -> Any:
    """A dataclass field with that default, which `Policy` checks against its range."""
    return field(default=of.default, metadata={"hyper_parameter": of})


def draw_arm(state: State, probability: Tensor) -> Tensor:
    """One arm per bandit, int64 [batch], drawn with `probability` [batch, arms], which sums to 1 over the arms."""
    threshold = uniform(state["key"][:, 0], state["round"])[:, None]
    return (probability.cumsum(dim=-1) < threshold).sum(dim=-1).clamp(max=probability.shape[-1] - 1)


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Chooses an arm every round and learns from its reward, for a batch of independent bandits at once.

    A policy holds hyper-parameters only. All memory is in the `State` that its methods take and return; they are pure
    tensor functions without host synchronisation, so they compile with `fullgraph=True` and may be captured in a CUDA
    graph. Statistics are float64: rewards shrink by orders of magnitude while a run lasts.
    """

    arms: int

    @property
    def beliefs(self) -> int:
        """Of how many things the policy keeps a belief: of every arm, if it does not say otherwise."""
        return self.arms

    def __post_init__(self) -> None:
        if self.arms < 1:
            raise ValueError(f"arms must be at least 1, got {self.arms}")
        for parameter in fields(self):
            if "hyper_parameter" in parameter.metadata:
                parameter.metadata["hyper_parameter"].check(parameter.name, getattr(self, parameter.name))

    def init(self, batch: int = 1, seed: int = 0, device: torch.device | str = "cpu") -> State:
        """The state of `batch` bandits that have seen nothing.

        Bandit i of any batch draws the same random numbers under the same `seed`, an integer in [0, 2**64).

        Raises:
            ValueError: `batch` is less than 1, or `seed` is out of range.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        clock = {
            "key": make_keys(seed, (batch, self.beliefs), device),
            "round": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        return clock | self.init_belief(batch, torch.device(device))

    def select(self, state: State) -> tuple[Tensor, State]:
        """The arm of this round, int64 [batch], and the state with its round counted.

        `AllModules` answers -1, every other policy a number in [0, arms).
        """
        arm = self.choose(state)
        return arm, state | {"round": state["round"] + 1}

    @abstractmethod
    def update(self, state: State, arm: Tensor, reward: Tensor) -> State:
        """The state after `reward` (floating point [batch]) was seen for `arm` (int64 [batch])."""

    @abstractmethod
    def init_belief(self, batch: int, device: torch.device) -> State:
        """What the policy keeps beside the clock."""

    @abstractmethod
    def choose(self, state: State) -> Tensor:
        """int64 [batch], from the state before the round is counted."""

    @abstractmethod
    def posterior(self, state: State) -> tuple[Tensor, Tensor]:
        """Estimated reward of every arm and the spread of that estimate, each float64 [batch, beliefs], for display.

        Both are in units of the reward. For an arm never pulled they tell the prior.
        """


@dataclass(frozen=True, kw_only=True)
class ArmPolicy(Policy):
    """A policy that keeps a belief of every arm, and learns from the reward of the arm that was pulled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arms > _MOST_ARMS:
            raise ValueError(
                f"arms must be at most {_MOST_ARMS} for a policy that keeps a belief of every one, got {self.arms}"
            )

    def update(self, state: State, arm: Tensor, reward: Tensor) -> State:
        """See `Policy.update`."""
        pulled = arm[:, None] == torch.arange(self.arms, device=arm.device)
        return state | self.learn(state, pulled, reward.to(torch.float64)[:, None])

    @abstractmethod
    def learn(self, state: State, pulled: Tensor, reward: Tensor) -> State:
        """The changed entries of the state, given `pulled` bool [batch, arms] and `reward` float64 [batch, 1]."""


@dataclass(frozen=True, kw_only=True)
class AdaptivePolicy(ArmPolicy):
    """A policy that compares arms: it tries each once, in order, before it compares, and can guarantee a minimum share.

    `min_share` bounds idleness rather than drawing lots: an arm that has waited longer than 1 / min_share rounds is
    pulled, the one that waited longest first. So an arm is pulled at least once in every 1 / min_share + arms rounds,
    wherever in the run they lie, at no cost in randomness.
    """

    min_share: float = hyper_parameter(MIN_SHARE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_share * self.arms > 1:
            raise ValueError(f"min_share must be at most 1 / arms = {1 / self.arms:.4g}, got {self.min_share}")

    def init(self, batch: int = 1, seed: int = 0, device: torch.device | str = "cpu") -> State:
        last = torch.full((batch, self.arms), -_ALWAYS, dtype=torch.int64, device=device)
        return super().init(batch, seed, device) | {"last": last}

    def select(self, state: State) -> tuple[Tensor, State]:
        preferred, after = super().select(state)
        longest, idlest = torch.max(state["round"][:, None] - state["last"], dim=-1)
        patience = 1.0 / self.min_share if self.min_share > 0 else _ALWAYS - 1
        return torch.where(longest > patience, idlest, preferred), after

    def update(self, state: State, arm: Tensor, reward: Tensor) -> State:
        last = state["last"].scatter(1, arm[:, None], state["round"][:, None])
        return super().update(state, arm, reward) | {"last": last}
