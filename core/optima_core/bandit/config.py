"""Who chooses the module: the options, checked when they are made, and the policy they make. Imports no torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from optima_core.bandit.catalogue import (
    CATALOGUE,
    FACTORED,
    GAMMA,
    MIN_SHARE,
    ArmKind,
    check_hyper_parameters,
    check_name,
    discounts_rewards,
)

if TYPE_CHECKING:
    from optima_core.bandit.policy import Policy


@dataclass(frozen=True)
class BanditConfig:
    """Who chooses the module.

    Attributes:
        policy: Name of the policy: discounted_thompson, sliding_window_thompson, kalman_thompson, stationary_thompson,
            linear_thompson, which gives every module a strength, discounted_ucb, exp3s, epsilon_greedy, uniform,
            round_robin, fixed_arm, or all_modules, which distils every module in every round and chooses nothing.
        arms: "modules" offers each module alone, "subsets" every non-empty set of modules, "strengths" one of four
            strengths, 0 among them, for every module. null is "strengths" for the policies that keep a belief a module
            (linear_thompson), which take nothing else, and "modules" for the others.
        min_share: Least share of the rounds of every arm, at most 1 / arms; policies that do not learn ignore it.
        gamma: Discount per round of past rewards, for the policies that discount them: a memory of about 1 / (1 -
            gamma) rounds. Shorter than the policies' own default, which suits thousands of rounds: in a run of tens,
            rewards fall tenfold, and old ones say little about what an arm brings now.
        options: Other hyper-parameters of the policy by name, e.g. nu; those left out keep their defaults.
    """

    policy: str = "discounted_thompson"
    arms: ArmKind | None = None
    min_share: float = 0.1
    gamma: float = 0.8
    options: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.arms is not None and self.arms not in get_args(ArmKind):
            raise ValueError(f"bandit.arms must be 'modules', 'subsets' or 'strengths', got {self.arms!r}")
        MIN_SHARE.check("bandit.min_share", self.min_share)
        GAMMA.check("bandit.gamma", self.gamma)
        check_name(self.policy, "bandit.policy: ")
        check_hyper_parameters(self.policy, self.options, "bandit.options.")
        if self.policy in FACTORED and self.arms not in (None, "strengths"):
            raise ValueError(f"bandit.arms must be 'strengths' with policy {self.policy}, got {self.arms!r}")

    @property
    def arm_kind(self) -> ArmKind:
        """What the arms are, whether or not they were named."""
        return self.arms or ("strengths" if self.policy in FACTORED else "modules")

    def make(self, arms: int) -> "Policy":
        """The policy for that many arms, with those of these settings that it knows and `options` does not give.

        Raises ValueError if an option does not fit the number of arms.
        """
        from optima_core.bandit.registry import make_policy

        settings: dict[str, float] = {}
        if "min_share" in CATALOGUE[self.policy]:
            settings["min_share"] = min(self.min_share, 1 / arms)
        if discounts_rewards(self.policy):
            settings["gamma"] = self.gamma
        return make_policy(self.policy, arms=arms, **settings | self.options)
