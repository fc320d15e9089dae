"""A round of 512 bandits with 7 arms, a selection and an update each, beside MABWiser and SMPyBandits, on one thread.

Neither peer knows batches, so each runs 512 objects in a Python loop, which is how their users run many bandits. What
must be equal is what the bandits have learnt: told the same pulls and rewards (0 or 1), every arm's mean reward. Beta
posteriors, which the peers' Thompson sampling has, are cheaper to draw from than our Gaussian ones are to keep.

SMPyBandits' two discounted policies learn something else than their formulas say: one keeps discounted counts as
integers, the other discounts the pulled arm in place of the others. They are timed all the same, and not compared.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from bench.harness.contest import Contest, Run, Sweep
from bench.harness.peers import compiled, mabwiser, smpybandits
from optima_core.bandit import make_policy

GAMMA = 0.98
TAUGHT_ROUNDS = 20


def contests(device: torch.device, batch: int = 512, arms: int = 7) -> list[Contest]:
    """On any machine on the CPU, where the peers run."""
    if device.type != "cpu":
        return []
    discounted = {"gamma": GAMMA}
    return [
        contest("UCB", "discounted_ucb", {"gamma": 1.0}, {"SMPyBandits": "UCB", "MABWiser": "UCB1"}, batch, arms),
        contest(
            "Thompson sampling",
            "stationary_thompson",
            {},
            {"SMPyBandits": "Thompson", "MABWiser": "ThompsonSampling"},
            batch,
            arms,
        ),
        contest("discounted UCB", "discounted_ucb", discounted, {"SMPyBandits": "DiscountedUCB"}, batch, arms),
        contest(
            "discounted Thompson sampling",
            "discounted_thompson",
            discounted,
            {"SMPyBandits": "DiscountedThompson"},
            batch,
            arms,
        ),
    ]


def sweeps(device: torch.device) -> list[Sweep]:
    if device.type != "cpu":
        return []
    return [
        Sweep(
            "bandit",
            "discounted Thompson sampling, 7 arms",
            "batch",
            (64, 512, 4096, 32768),
            lambda batch: contest(
                "discounted Thompson sampling", "discounted_thompson", {"gamma": GAMMA}, {}, batch, 7
            ),
            contenders=("optima",),
        )
    ]


def contest(
    title: str, policy: str, hyper_parameters: dict[str, float], peers: dict[str, str], batch: int, arms: int
) -> Contest:
    generator = torch.Generator().manual_seed(0)
    pulls = torch.randint(arms, (TAUGHT_ROUNDS, batch), generator=generator)
    pulls[:arms] = torch.arange(arms)[:, None].expand(-1, batch)[:TAUGHT_ROUNDS]  # every arm once
    rewards = torch.randint(2, (64, batch, arms), generator=generator).double()

    def ours(compile_it: bool = False) -> Run:
        made = make_policy(policy, arms=arms, prior_count=1e-6, **hyper_parameters)
        state = made.init(batch)
        for arm, told in zip(pulls, rewards[:TAUGHT_ROUNDS], strict=True):
            _, state = made.select(state)
            state = made.update(state, arm, told.gather(1, arm[:, None])[:, 0])
        learnt = made.posterior(state)[0]
        states, tables = [state], cycle(rewards)

        def step(state: dict[str, Tensor], table: Tensor) -> dict[str, Tensor]:
            arm, state = made.select(state)
            return made.update(state, arm, table.gather(1, arm[:, None])[:, 0])

        called = compiled(step) if compile_it else step

        def run() -> Sequence[Tensor]:
            states[0] = called(states[0], next(tables))
            return (learnt,)

        return one_thread(run)

    def theirs(package: str, name: str) -> Run:
        bandits = PEERS[package](name, batch, arms, hyper_parameters)
        for arm, told in zip(pulls.tolist(), rewards[:TAUGHT_ROUNDS].tolist(), strict=True):
            for bandit, pulled, table in zip(bandits, arm, told, strict=True):
                bandit.learn(pulled, table[pulled])
        learnt = torch.tensor([bandit.means() for bandit in bandits], dtype=torch.float64)
        tables = cycle(rewards.tolist())

        def run() -> Sequence[Tensor]:
            for bandit, table in zip(bandits, next(tables), strict=True):
                arm = bandit.choose()
                bandit.learn(arm, table[arm])
            return (learnt,)

        return one_thread(run)

    contenders: dict[str, Callable[[], Run]] = {
        "optima": ours,
        "optima, compiled": lambda: ours(compile_it=True),
    }
    for package, name in peers.items():
        contenders[package] = lambda package=package, name=name: theirs(package, name)
    return Contest(
        suite="bandit",
        name=f"{title}, {batch} bandits, {arms} arms",
        contenders=contenders,
        unequal=("SMPyBandits",) if "discounted" in title else (),
        memory=False,
    )


def one_thread(run: Run) -> Run:
    """Both peers have but one."""

    def limited() -> Sequence[Tensor]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    return limited


class FromSMPyBandits:
    def __init__(self, policy: Any) -> None:
        self.policy = policy
        policy.startGame()

    def choose(self) -> int:
        return int(self.policy.choice())

    def learn(self, arm: int, reward: float) -> None:
        self.policy.getReward(arm, reward)

    def means(self) -> list[float]:
        if hasattr(self.policy, "discounted_pulls"):
            return list(self.policy.discounted_rewards / self.policy.discounted_pulls)
        if hasattr(self.policy, "posterior"):
            start = [told.__class__().N for told in self.policy.posterior]
            wins = [told.N[1] - at[1] for told, at in zip(self.policy.posterior, start, strict=True)]
            return [n / (sum(told.N) - sum(at)) for n, told, at in zip(wins, self.policy.posterior, start, strict=True)]
        return list(self.policy.rewards / self.policy.pulls)


class FromMABWiser:
    def __init__(self, policy: Any, arms: int) -> None:
        self.policy, self.arms = policy, arms
        self.fitted = False

    def choose(self) -> int:
        return int(self.policy.predict())

    def learn(self, arm: int, reward: float) -> None:
        (self.policy.partial_fit if self.fitted else self.policy.fit)([arm], [reward])
        self.fitted = True

    def means(self) -> list[float]:
        told = self.policy._imp
        if hasattr(told, "arm_to_success_count"):  # which start at 1
            wins, losses = told.arm_to_success_count, told.arm_to_fail_count
            return [(wins[k] - 1) / (wins[k] + losses[k] - 2) for k in range(self.arms)]
        return [told.arm_to_mean[k] for k in range(self.arms)]


def from_smpybandits(name: str, batch: int, arms: int, hyper_parameters: dict[str, float]) -> list[Any]:
    policies = smpybandits()
    known = hyper_parameters if name.startswith("Discounted") else {}
    return [FromSMPyBandits(getattr(policies, name)(arms, **known)) for _ in range(batch)]


def from_mabwiser(name: str, batch: int, arms: int, hyper_parameters: dict[str, float]) -> list[Any]:
    mab = mabwiser()
    policy = getattr(mab.LearningPolicy, name)()
    return [FromMABWiser(mab.MAB(list(range(arms)), policy, seed=i), arms) for i in range(batch)]


PEERS: dict[str, Callable[..., list[Any]]] = {"SMPyBandits": from_smpybandits, "MABWiser": from_mabwiser}
