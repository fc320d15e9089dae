"""Policies by name."""

from dataclasses import fields
from difflib import get_close_matches

from optima_core.bandit.policy import Policy
from optima_core.bandit.thompson import DiscountedThompson

POLICIES: dict[str, type[Policy]] = {
    "discounted_thompson": DiscountedThompson,
}


def make_policy(name: str, arms: int, **hyper_parameters: float) -> Policy:
    """The policy `name` of `POLICIES` for `arms` arms; its class documents its formula and hyper-parameters.

    Raises:
        ValueError: the name or a hyper-parameter is unknown, or a value is out of range.
    """
    if name not in POLICIES:
        raise ValueError(_unknown("policy", name, list(POLICIES)))
    policy = POLICIES[name]
    known = [parameter.name for parameter in fields(policy) if "doc" in parameter.metadata]
    for given in hyper_parameters:
        if given not in known:
            raise ValueError(_unknown(f"hyper-parameter of {name}", given, known))
    return policy(arms=arms, **hyper_parameters)


def _unknown(what: str, given: str, known: list[str]) -> str:
    nearest = get_close_matches(given, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "known: " + (", ".join(known) or "none")
    return f"unknown {what} {given!r}; {hint}"
