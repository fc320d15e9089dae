"""Made-up worlds in which a policy's regret can be known, batched over seeds.

`Abrupt` and `Sine` are the usual two kinds of change in the literature on non-stationary bandits. `Distil` imitates
module-wise distillation: every module has an excess loss that falls when the module is pulled, by less and less, and
creeps back while it is not. In `Company` modules are distilled together, at strengths, and what one brings depends on
the others.

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

from optima_core.bandit import LEVELS
from optima_core.rng import make_keys, normal, uniform

State = dict[str, Tensor]

# Uses of the random numbers of one (seed, arm), apart from round-wise noise, which is stream 0.
_MEAN, _PHASE, _INITIAL, _RATE, _RECOVERY, _EFFECT, _PLACE, _PAIR = range(1, 9)


def share_of(strengths: Tensor) -> Tensor:
    """How a round's work is divided among modules, equally among those that are distilled: float64, like strengths."""
    taken = (strengths > 0).to(torch.float64)
    return taken / taken.sum(dim=-1, keepdim=True).clamp(min=1.0)


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

    def gain(self, state: State, strengths: Tensor) -> Tensor:
        """Mean reward of a round at these strengths, float [seeds, arms]: float64 [seeds]."""
        return (share_of(strengths) * self.expected_reward(state)).sum(dim=-1)

    def noise_at(self, noise: Tensor, strengths: Tensor) -> Tensor:
        """What is added to `gain`, of the noise of all arms: float64 [seeds]."""
        return (share_of(strengths) * noise).sum(dim=-1)

    def best_strengths(self, state: State) -> Tensor:
        """Strengths of the largest `gain`: float64 [seeds, arms]."""
        expected = self.expected_reward(state)
        return torch.zeros_like(expected).scatter(1, expected.argmax(dim=-1, keepdim=True), 1.0)

    def uniform_gain(self, state: State) -> Tensor:
        """Mean of `gain` over the choices that a policy has: float64 [seeds]."""
        return self.expected_reward(state).mean(dim=-1)


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


@dataclass(frozen=True)
class Company(Environment):
    """Modules distilled together, at one of the four strengths of an arm, of which the best one drifts.

    gain = sum over modules k of e_k u exp(1 - u)  -  sum over pairs of distilled modules j < k of h_jk

    where u = strength / best_k(t), e_k ~ U[0, 1] and log_3 best_k(t) = sin(2 pi (t / period + place of k)), so that the
    best of the strengths 1/3, 1 and 3 changes over time. h_jk ~ `strife` U[-1, 1] is what two modules cost each other:
    effects do not add up, and some module that helps alone hurts in company.
    """

    noise: float = 0.25
    period: int = 1000
    strife: float = 0.3

    def init_world(self, key: Tensor) -> State:
        start = torch.zeros_like(key[..., 0])
        pair = 2.0 * uniform(key[:, :, None, :], torch.arange(self.arms, device=key.device), stream=_PAIR) - 1.0
        return {
            "effect": uniform(key, start, stream=_EFFECT),
            "place": uniform(key, start, stream=_PLACE),
            "strife": self.strife * torch.triu(pair, diagonal=1),
        }

    def expected_reward(self, state: State) -> Tensor:
        return self._alone(state, torch.ones_like(state["effect"]))

    def gain(self, state: State, strengths: Tensor) -> Tensor:
        strengths = strengths.to(torch.float64)
        taken = (strengths > 0).to(torch.float64)
        strife = (taken[:, None, :] @ state["strife"] @ taken[:, :, None])[:, 0, 0]
        return self._alone(state, strengths).sum(dim=-1) - strife

    def noise_at(self, noise: Tensor, strengths: Tensor) -> Tensor:
        return noise[:, 0]

    def best_strengths(self, state: State) -> Tensor:
        """At its best strength a module costs the others what it costs them at any; so try all sets of modules."""
        levels = torch.tensor(LEVELS[1:], dtype=torch.float64, device=state["effect"].device)
        alone = torch.stack([self._alone(state, level.expand_as(state["effect"])) for level in levels], dim=-1)
        value, level = alone.max(dim=-1)
        sets = torch.arange(2**self.arms, device=value.device)
        members = ((sets[:, None] >> torch.arange(self.arms, device=value.device)) & 1).to(torch.float64)
        strife = torch.einsum("nj,sjk,nk->sn", members, state["strife"], members)
        best = (value @ members.mT - strife).argmax(dim=-1)
        return members[best] * levels[level]

    def uniform_gain(self, state: State) -> Tensor:
        """Over all arms: each module is off in one of four, and a pair on in nine of sixteen."""
        levels = [self._alone(state, torch.full_like(state["effect"], level)) for level in LEVELS[1:]]
        return torch.stack(levels).sum(dim=(0, -1)) / len(LEVELS) - 9 / 16 * state["strife"].sum(dim=(-2, -1))

    def _alone(self, state: State, strengths: Tensor) -> Tensor:
        best = 3.0 ** torch.sin(2.0 * math.pi * (state["round"] / self.period + state["place"]))
        ratio = strengths / best
        return state["effect"] * ratio * torch.exp(1.0 - ratio)


ENVIRONMENTS: dict[str, Callable[[int, int], Environment]] = {
    "abrupt": Abrupt,
    "sine": Sine,
    "distil_a": partial(Distil, noise=0.005),
    "distil_b": partial(Distil, noise=0.02),
    "distil_c": partial(Distil, noise=0.005, transfer=0.5),
    "company": Company,
}
"""The environments by name: called with the number of arms and of rounds."""
