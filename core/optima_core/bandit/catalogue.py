"""Every policy's name and hyper-parameters, known before torch is: what a configuration is checked against.

The classes take their fields from here, so that a default or a range stands in one place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

ArmKind = Literal["modules", "subsets", "strengths"]
"""What an arm stands for: one module, a set of them, or a strength for each."""


@dataclass(frozen=True)
class HyperParameter:
    """A number that tunes a policy, in the closed interval [low, high]; integers have an integer for a default."""

    default: float
    low: float
    high: float
    doc: str

    def check(self, name: str, value: float) -> None:
        """Raises ValueError, with the name, if the value is out of range."""
        is_integer = isinstance(self.default, int)
        if not self.low <= value <= self.high or (is_integer and value != int(value)):
            kind = "an integer" if is_integer else "a number"
            raise ValueError(f"{name} must be {kind} in [{self.low:g}, {self.high:g}], got {value}")


_NU = "width of the draw in posterior standard deviations; less is greedier"

MIN_SHARE = HyperParameter(0.0, 0.0, 1.0, "least share of the rounds every arm gets; at most 1 / arms")
PRIOR_COUNT = HyperParameter(0.01, 1e-6, 100.0, "rewards' worth of the prior at the mean of all arms")
GAMMA = HyperParameter(0.98, 0.5, 1.0, "discount per round; the memory is about 1 / (1 - gamma) rounds")
NU = HyperParameter(0.35, 0.0, 100.0, _NU)
NU_OF_WINDOW = HyperParameter(0.5, 0.0, 100.0, _NU)
NU_OF_KALMAN = HyperParameter(0.5, 0.0, 100.0, _NU)
NU_OF_STATIONARY = HyperParameter(1.0, 0.0, 100.0, _NU)
WINDOW = HyperParameter(100, 1, 2**20, "rounds that are remembered")
DRIFT = HyperParameter(0.01, 0.0, 100.0, "q, variance of one round's walk, in units of sigma**2")
PRIOR_VARIANCE = HyperParameter(100.0, 1e-6, 1e12, "v_0, variance of an unknown arm, in units of sigma**2")
PRIOR_PRECISION = HyperParameter(1.0, 1e-6, 100.0, "lambda: rewards' worth of the prior belief")
TRUST = HyperParameter(1.0, 0.0, 100.0, "what strength 1 is believed to be worth against none, in units of sigma")
GAMMA_OF_SIGMA = HyperParameter(0.99, 0.5, 1.0, "discount per round of the estimate of sigma")
WIDTH = HyperParameter(0.35, 0.0, 100.0, "factor of the bonus; less is greedier")
ETA = HyperParameter(0.4, 1e-6, 1.0, "share of rounds drawn uniformly, and learning rate")
ALPHA = HyperParameter(1e-3, 0.0, 1.0, "leak between weights; about 1 over the rounds between changes")
EPSILON = HyperParameter(0.1, 0.0, 1.0, "probability of a uniformly drawn arm")
ARM = HyperParameter(0, 0, 2**12, "the arm; less than the number of arms")

_ADAPTIVE = {"min_share": MIN_SHARE}
_BELIEF = {"prior_count": PRIOR_COUNT}
_DISCOUNTED = _BELIEF | {"gamma": GAMMA}

CATALOGUE: Mapping[str, Mapping[str, HyperParameter]] = {
    "discounted_thompson": _ADAPTIVE | {"nu": NU} | _DISCOUNTED,
    "sliding_window_thompson": _ADAPTIVE | {"nu": NU_OF_WINDOW} | _BELIEF | {"window": WINDOW},
    "kalman_thompson": _ADAPTIVE
    | {"nu": NU_OF_KALMAN, "drift": DRIFT, "prior_variance": PRIOR_VARIANCE, "gamma": GAMMA_OF_SIGMA},
    "stationary_thompson": _ADAPTIVE | {"nu": NU_OF_STATIONARY} | _BELIEF,
    "linear_thompson": {"gamma": GAMMA, "nu": NU, "prior_precision": PRIOR_PRECISION, "trust": TRUST},
    "discounted_ucb": _ADAPTIVE | _DISCOUNTED | {"width": WIDTH},
    "exp3s": _DISCOUNTED | {"eta": ETA, "alpha": ALPHA},
    "epsilon_greedy": _ADAPTIVE | _DISCOUNTED | {"epsilon": EPSILON},
    "uniform": _DISCOUNTED,
    "round_robin": _DISCOUNTED,
    "fixed_arm": _DISCOUNTED | {"arm": ARM},
    "all_modules": _DISCOUNTED,
}


def check_policy(name: str, hyper_parameters: Mapping[str, float]) -> None:
    """Raises ValueError if the policy or a hyper-parameter is unknown, or a value out of range."""
    check_name(name)
    check_hyper_parameters(name, hyper_parameters)


def check_name(name: str, where: str = "") -> None:
    """Raises ValueError, its message behind `where`, if there is no policy of that name."""
    if name not in CATALOGUE:
        raise ValueError(f"{where}unknown policy {name!r}; {_hint(name, list(CATALOGUE))}")


def check_hyper_parameters(policy: str, given: Mapping[str, float], where: str = "") -> None:
    """Raises ValueError if the policy has not got a hyper-parameter, or a value is out of range.

    where: what stands before their names in the message, as "bandit.options.".
    """
    known = CATALOGUE[policy]
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{where}{name} is no hyper-parameter of {policy}; {_hint(name, list(known))}")
        known[name].check(where + name, value)


FACTORED = ("linear_thompson",)
"""The policies that keep a belief a module, over arms of kind "strengths"."""


def describe_hyper_parameters(name: str) -> dict[str, str]:
    """What each hyper-parameter of the policy `name` does, with its default and range, for help texts."""
    return {
        name: f"{found.doc} (default {found.default}, in [{found.low:g}, {found.high:g}])"
        for name, found in CATALOGUE[name].items()
    }


def discounts_rewards(name: str) -> bool:
    """Whether the policy `name` has a hyper-parameter gamma that discounts past rewards."""
    return CATALOGUE[name].get("gamma") is GAMMA


def _hint(given: str, known: list[str]) -> str:
    nearest = [repr(name) for name in _nearest(given, known)]
    if not nearest:
        return f"known: {', '.join(known)}"
    *others, last = nearest
    return f"did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def _nearest(given: str, known: list[str]) -> list[str]:
    """The names that are most alike as a whole or in one of their words: of "thomson", every thompson."""

    def alike(name: str) -> float:
        return max(SequenceMatcher(None, given, part).ratio() for part in (name, *name.split("_")))

    likeness = {name: alike(name) for name in known}
    best = max(likeness.values(), default=0.0)
    return [name for name in known if best >= 0.7 and likeness[name] == best]
