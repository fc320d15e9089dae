"""Made-up worlds in which a policy's regret can be known, batched over seeds.

`Abrupt` and `Sine` are the usual two kinds of change in the literature on non-stationary bandits. `Distil` imitates
module-wise distillation: every module has an excess loss that falls when the module is pulled, by less and less, and
creeps back while it is not.

An environment does not know who acts on it. Its state says what each arm would yield now; `advance` applies what a
round did. Noise is a function of seed, round and arm alone, so every policy meets the same.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from optima_core.rng import make_keys, normal, uniform

State = dict[str, Tensor]

# Uses of the random numbers of one (seed, arm), apart from round-wise noise, which is stream 0.
_MEAN, _PHASE, _INITIAL, _RATE, _RECOVERY = range(1, 6)


@dataclass(frozen=True)
class Environment(ABC):
    """Rewards of `arms` arms over `rounds` rounds, with Gaussian noise of standard deviation `noise`."""

    arms: int
    rounds: int
    noise: float

    def init(self, seeds: int, seed: int, device: torch.device | str = "cpu") -> State:
        """The world of each of `seeds` seeds before round 0; seed i is the same world in any batch."""
        key = make_keys(seed, (seeds, self.arms), device)
        clock = torch.zeros(seeds, 1, dtype=torch.int64, device=device)
        return {"key": key, "round": clock} | self.init_world(key)

    def draw_noise(self, state: State) -> Tensor:
        """What is added to the reward of each arm this round, float64 [seeds, arms]."""
        return self.noise * normal(state["key"], state["round"])

    def advance(self, state: State, share: Tensor) -> State:
        """The state after a round that spent `share` of its work, float [seeds, arms] with sum 1, on each arm."""
        return state | {"round": state["round"] + 1} | self.react(state, share)

    @abstractmethod
    def init_world(self, key: Tensor) -> State:
        """What is drawn once."""

    @abstractmethod
    def expected_reward(self, state: State) -> Tensor:
        """Mean reward of each arm if the whole round is spent on it, float64 [seeds, arms]."""

    def react(self, state: State, share: Tensor) -> State:
        """What in the world a round changes; by default nothing."""
        return {}


@dataclass(frozen=True)
class Abrupt(Environment):
    """Means drawn from U[0, 1], anew in each of 5 equal segments."""

    noise: float = 0.25
    segments: int = 5

    def init_world(self, key: Tensor) -> State:
        return {}

    def expected_reward(self, state: State) -> Tensor:
        return uniform(state["key"], state["round"] * self.segments // self.rounds, stream=_MEAN)


@dataclass(frozen=True)
class Sine(Environment):
    """mean_k = 0.5 + 0.4 sin(2 pi t / 1000 + 2 pi k / K + phase), with the phase of a seed from U[0, 2 pi]."""

    noise: float = 0.25
    period: int = 1000

    def init_world(self, key: Tensor) -> State:
        turn = torch.arange(self.arms, dtype=torch.float64, device=key.device) / self.arms
        start = torch.zeros_like(key[:, :1, 0])
        return {"turn": turn + uniform(key[:, :1], start, stream=_PHASE)}

    def expected_reward(self, state: State) -> Tensor:
        return 0.5 + 0.4 * torch.sin(2.0 * math.pi * (state["round"] / self.period + state["turn"]))


@dataclass(frozen=True)
class Distil(Environment):
    """Excess losses that a pull lowers and that recover while idle.

    Loss k starts at L0_k ~ U[0.5, 2]. A pull lowers it by a_k L_k, which is its expected reward, with a_k log-uniform
    in [2e-4, 2e-2]. Then every loss recovers by rho_k (L0_k - L_k), with rho_k log-uniform in [1e-4, 2e-3]. A pull of
    k also lowers every other loss j by `transfer` times the decrement of k times L_j / L0_j.
    """

    noise: float = 0.005
    transfer: float = 0.0

    def init_world(self, key: Tensor) -> State:
        start = torch.zeros_like(key[..., 0])
        initial = 0.5 + 1.5 * uniform(key, start, stream=_INITIAL)
        return {
            "initial": initial,
            "loss": initial,
            "rate": 2e-4 * 100.0 ** uniform(key, start, stream=_RATE),
            "recovery": 1e-4 * 20.0 ** uniform(key, start, stream=_RECOVERY),
        }

    def expected_reward(self, state: State) -> Tensor:
        return state["rate"] * state["loss"]

    def react(self, state: State, share: Tensor) -> State:
        decrement = share * self.expected_reward(state)
        others = decrement.sum(dim=-1, keepdim=True) - decrement
        loss = state["loss"] - decrement - self.transfer * others * state["loss"] / state["initial"]
        loss = loss.clamp(min=0.0)
        return {"loss": loss + state["recovery"] * (state["initial"] - loss)}


ENVIRONMENTS: dict[str, Callable[[int, int], Environment]] = {
    "abrupt": Abrupt,
    "sine": Sine,
    "distil_a": partial(Distil, noise=0.005),
    "distil_b": partial(Distil, noise=0.02),
    "distil_c": partial(Distil, noise=0.005, transfer=0.5),
}
"""The environments by name: called with the number of arms and of rounds."""
