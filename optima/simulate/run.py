"""Runs policies against environments, all policies in lockstep on the same noise."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optima.simulate.environments import Environment, share_of
from optima_core.bandit import ArmKind, Policy, arm_strengths


@dataclass(frozen=True)
class Trial:
    """How the policies fared in one environment. Regret is what the oracle gained less what the policy gained.

    The oracle always takes what has the largest expected reward, in a world of its own.

    Attributes:
        regret: mean over seeds of the cumulative regret after each round, [policies, rounds].
        choices: mean over seeds of the work spent on the module that is best at the time, second best and so on, each
            round, [policies, rounds, modules].
        final_regret: regret of each seed after the last round, [policies, seeds].
        early_gap_closed: regret that the policy saved against uniform choice by the early round, as a share of
            uniform's regret, mean over seeds in numerator and denominator, [policies].
        early_gap_closed_error: its standard error by the delta method, [policies].
    """

    regret: Tensor
    choices: Tensor
    final_regret: Tensor
    early_gap_closed: Tensor
    early_gap_closed_error: Tensor

    @property
    def final_regret_error(self) -> Tensor:
        """Standard error over seeds of the mean of `final_regret`, [policies]."""
        return self.final_regret.std(dim=-1) / math.sqrt(self.final_regret.shape[-1])


def run_trial(
    environment: Environment,
    policies: Sequence[Policy],
    kinds: Sequence[ArmKind] | None = None,
    *,
    seeds: int = 512,
    seed: int = 0,
    early_round: int = 500,
    device: torch.device | str = "cpu",
    on_round: Callable[[], object] = lambda: None,
) -> Trial:
    """Run every policy for `environment.rounds` rounds on `seeds` independent worlds at once.

    A round's work is divided equally among the modules of the chosen arm, so an arm of several modules, and the
    policy that takes all of them, cost as much as a single module. Uniform choice is known in expectation and is not
    sampled.

    Args:
        kinds: what the arms of each policy stand for, modules by default; the environment's arms are the modules.
        early_round: number of rounds after which the gap closed is told.
        on_round: called after every round, for progress.
    """
    kinds = kinds or ["modules"] * len(policies)
    beliefs = [policy.init(seeds, seed + 1, device) for policy in policies]
    worlds = [environment.init(seeds, seed, device) for _ in policies]
    oracle_world, uniform_world = environment.init(seeds, seed, device), environment.init(seeds, seed, device)
    evenly = torch.full((seeds, environment.arms), 1.0 / environment.arms, dtype=torch.float64, device=device)

    regret = torch.zeros(len(policies), environment.rounds, dtype=torch.float64, device=device)
    choices = torch.zeros(len(policies), environment.rounds, environment.arms, dtype=torch.float64, device=device)
    lost = torch.zeros(len(policies), seeds, dtype=torch.float64, device=device)
    uniform_lost = torch.zeros(seeds, dtype=torch.float64, device=device)
    closed = closed_error = torch.zeros(len(policies), dtype=torch.float64, device=device)

    for t in range(environment.rounds):
        noise = environment.draw_noise(oracle_world)
        best = environment.best_strengths(oracle_world)
        promised = environment.gain(oracle_world, best)
        oracle_world = environment.advance(oracle_world, share_of(best))
        uniform_lost += promised - environment.uniform_gain(uniform_world)
        uniform_world = environment.advance(uniform_world, evenly)
        for p, policy in enumerate(policies):
            arm, belief = policy.select(beliefs[p])
            strengths = arm_strengths(arm, environment.arms, kinds[p])
            expected, spent = environment.expected_reward(worlds[p]), share_of(strengths)
            gained = environment.gain(worlds[p], strengths)
            beliefs[p] = policy.update(belief, arm, gained + environment.noise_at(noise, strengths))
            worlds[p] = environment.advance(worlds[p], spent)
            lost[p] += promised - gained
            choices[p, t] = spent.gather(1, expected.argsort(dim=-1, descending=True)).mean(dim=0)
        regret[:, t] = lost.mean(dim=-1)
        if t + 1 == min(early_round, environment.rounds):
            closed, closed_error = _gap_closed(lost, uniform_lost)
        on_round()
    return Trial(regret, choices, lost, closed, closed_error)


def _gap_closed(lost: Tensor, uniform_lost: Tensor) -> tuple[Tensor, Tensor]:
    """1 - mean(lost) / mean(uniform_lost) for each policy, and its standard error."""
    left = lost.mean(dim=-1) / uniform_lost.mean()
    residual = lost - left[:, None] * uniform_lost
    return 1.0 - left, residual.std(dim=-1) / uniform_lost.mean() / math.sqrt(lost.shape[-1])
