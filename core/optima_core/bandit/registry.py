"""Policies by name."""

from optima_core.bandit.baselines import AllModules, EpsilonGreedy, FixedArm, RoundRobin, Uniform
from optima_core.bandit.catalogue import check_policy
from optima_core.bandit.exp3 import Exp3S
from optima_core.bandit.factored import LinearThompson
from optima_core.bandit.policy import Policy
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
    "linear_thompson": LinearThompson,
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
    check_policy(name, hyper_parameters)
    return POLICIES[name](arms=arms, **hyper_parameters)
