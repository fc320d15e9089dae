"""Policies by name."""

from dataclasses import fields
from difflib import get_close_matches

from optima_core.bandit.baselines import AllModules, EpsilonGreedy, FixedArm, RoundRobin, Uniform
from optima_core.bandit.exp3 import Exp3S
from optima_core.bandit.policy import Policy
from optima_core.bandit.statistics import DiscountedBelief
from optima_core.bandit.thompson import (
    DiscountedThompson,
    KalmanThompson,
    SlidingWindowThompson,
    StationaryThompson,
)
from optima_core.bandit.ucb import DiscountedUCB

POLICIES: dict[str, type[Policy]] = {
    "discounted_thompson": DiscountedThompson,
    "sliding_window_thompson": SlidingWindowThompson,
    "kalman_thompson": KalmanThompson,
    "stationary_thompson": StationaryThompson,
    "discounted_ucb": DiscountedUCB,
    "exp3s": Exp3S,
    "epsilon_greedy": EpsilonGreedy,
    "uniform": Uniform,
    "round_robin": RoundRobin,
    "fixed_arm": FixedArm,
    "all_modules": AllModules,
}


def make_policy(name: str, arms: int, **hyper_parameters: float) -> Policy:
    """The policy `name` of `POLICIES` for `arms` arms; its class documents its formula and hyper-parameters.

    Raises:
        ValueError: the name or a hyper-parameter is unknown, or a value is out of range.
    """
    if name not in POLICIES:
        raise ValueError(_unknown("policy", name, list(POLICIES)))
    known = describe_hyper_parameters(name)
    for given in hyper_parameters:
        if given not in known:
            raise ValueError(_unknown(f"hyper-parameter of {name}", given, list(known)))
    return POLICIES[name](arms=arms, **hyper_parameters)


def describe_hyper_parameters(name: str) -> dict[str, str]:
    """What each hyper-parameter of the policy `name` does, with its default and range, for help texts."""
    return {
        parameter.name: "{doc} (default {default}, in [{low:g}, {high:g}])".format(
            default=str(parameter.default), **parameter.metadata
        )
        for parameter in fields(POLICIES[name])
        if "doc" in parameter.metadata
    }


def discounts_rewards(name: str) -> bool:
    """Whether the policy `name` has a hyper-parameter gamma that discounts past rewards."""
    return issubclass(POLICIES[name], DiscountedBelief) and "gamma" in describe_hyper_parameters(name)


def _unknown(what: str, given: str, known: list[str]) -> str:
    nearest = get_close_matches(given, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "known: " + ", ".join(known)
    return f"unknown {what} {given!r}; {hint}"
