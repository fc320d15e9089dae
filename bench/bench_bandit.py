"""Rounds per second of 512 bandits with 7 arms, ours beside MABWiser and SMPyBandits, on one CPU thread.

    python -m pip install pytest-benchmark mabwiser SMPyBandits "scipy<1.14" "numpy<2" "pandas<3"
    python -m pytest bench/bench_bandit.py --benchmark-columns=ops,median,iqr,rounds

Like for like: a round is one selection and one update of every bandit, with rewards from the same table. Neither
peer knows batches, so each runs 512 objects in a Python loop, which is how their users run many bandits. Groups pair
the same kind of policy; SMPyBandits' discounted Thompson sampling and MABWiser's have Beta posteriors, ours Gaussian
ones, which cost more. A peer that cannot be imported is skipped. (SMPyBandits 0.9.7 needs a SciPy before 1.14.)
"""

from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import pytest
import torch

from optima_core.bandit import make_policy

BATCH, ARMS, GAMMA = 512, 7, 0.98
REWARDS = np.random.default_rng(0).beta(2, 2, (64, BATCH, ARMS))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def our_round(name: str, compiled: bool, **hyper_parameters: float) -> Callable[[], object]:
    policy = make_policy(name, arms=ARMS, **hyper_parameters)
    states = [policy.init(BATCH)]
    tables = cycle(torch.from_numpy(REWARDS))

    def step(state, rewards):
        arm, state = policy.select(state)
        return policy.update(state, arm, rewards.gather(1, arm[:, None])[:, 0])

    if compiled:
        step = torch.compile(step, fullgraph=True)

    def play() -> None:
        states[0] = step(states[0], next(tables))

    return play


def smpybandits_round(name: str, **arguments: float) -> Callable[[], object]:
    policies = pytest.importorskip("SMPyBandits.Policies", exc_type=ImportError)
    bandits = [getattr(policies, name)(ARMS, **arguments) for _ in range(BATCH)]
    for bandit in bandits:
        bandit.startGame()
    tables = cycle(REWARDS)

    def play() -> None:
        for bandit, rewards in zip(bandits, next(tables), strict=True):
            arm = bandit.choice()
            bandit.getReward(arm, rewards[arm])

    return play


def mabwiser_round(name: str, **arguments: object) -> Callable[[], object]:
    mab = pytest.importorskip("mabwiser.mab")
    arms = list(range(ARMS))
    bandits = [mab.MAB(arms, getattr(mab.LearningPolicy, name)(**arguments), seed=i) for i in range(BATCH)]
    for bandit in bandits:
        bandit.fit(arms, [0.5] * ARMS)
    tables = cycle(REWARDS)

    def play() -> None:
        for bandit, rewards in zip(bandits, next(tables), strict=True):
            arm = bandit.predict()
            bandit.partial_fit([arm], [rewards[arm]])

    return play


def reward_is_good(arm: int, reward: float) -> bool:
    return reward > 0.5


DISCOUNTED_UCB = {
    "optima, compiled": lambda: our_round("discounted_ucb", True, gamma=GAMMA),
    "optima, eager": lambda: our_round("discounted_ucb", False, gamma=GAMMA),
    "SMPyBandits": lambda: smpybandits_round("DiscountedUCB", gamma=GAMMA),
    "MABWiser (UCB1)": lambda: mabwiser_round("UCB1"),
}
THOMPSON = {
    "optima, compiled": lambda: our_round("discounted_thompson", True, gamma=GAMMA),
    "optima, eager": lambda: our_round("discounted_thompson", False, gamma=GAMMA),
    "SMPyBandits": lambda: smpybandits_round("DiscountedThompson", gamma=GAMMA),
    "MABWiser (not discounted)": lambda: mabwiser_round("ThompsonSampling", binarizer=reward_is_good),
}


def measure(benchmark, contenders: dict[str, Callable[[], Callable[[], object]]], name: str) -> None:
    """Samples of about a hundredth of a second or one round, whichever is longer."""
    iterations = 20 if name.startswith("optima") else 1
    benchmark.pedantic(contenders[name](), rounds=20, iterations=iterations, warmup_rounds=3)


@pytest.mark.benchmark(group="discounted UCB, 512 bandits, 7 arms")
@pytest.mark.parametrize("contender", DISCOUNTED_UCB)
def test_discounted_ucb(benchmark, contender):
    measure(benchmark, DISCOUNTED_UCB, contender)


@pytest.mark.benchmark(group="discounted Thompson sampling, 512 bandits, 7 arms")
@pytest.mark.parametrize("contender", THOMPSON)
def test_thompson(benchmark, contender):
    measure(benchmark, THOMPSON, contender)
