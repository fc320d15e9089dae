"""The bandit that can choose what is distilled next, as tensor operations on the device.

    policy = make_policy("discounted_thompson", arms=3)
    state = policy.init(batch=1, seed=0, device="cpu")
    arm, state = policy.select(state)             # int64 [batch]
    state = policy.update(state, arm, reward)     # floating point [batch]

The batch runs independent bandits: one while distilling, hundreds in a simulation, the same code. `POLICIES` names
every policy, `arm_strengths` turns the chosen arm into a strength for every module.

That module-wise distillation is a bandit with loss decrements as rewards and a modified Thompson sampling as its
policy is the paper's (Liang et al. 2023, arXiv 2310.04550, of which we hold the abstract only). Formulas are credited
where they stand; default values are ours, chosen by the simulation of `optima.simulate`.
"""

from typing import TYPE_CHECKING

from optima_core.lazily import attributes_from

if TYPE_CHECKING:
    from optima_core.bandit.arms import LEVELS, arm_strengths, belief_names, count_arms
    from optima_core.bandit.catalogue import CATALOGUE, ArmKind, describe_hyper_parameters
    from optima_core.bandit.config import BanditConfig
    from optima_core.bandit.policy import Policy, State
    from optima_core.bandit.registry import POLICIES, make_policy
else:
    __getattr__ = attributes_from(
        __name__,
        arms=("LEVELS", "arm_strengths", "belief_names", "count_arms"),
        catalogue=("CATALOGUE", "ArmKind", "describe_hyper_parameters"),
        config=("BanditConfig",),
        policy=("Policy", "State"),
        registry=("POLICIES", "make_policy"),
    )

__all__ = [
    "CATALOGUE",
    "LEVELS",
    "POLICIES",
    "ArmKind",
    "BanditConfig",
    "Policy",
    "State",
    "arm_strengths",
    "belief_names",
    "count_arms",
    "describe_hyper_parameters",
    "make_policy",
]
