"""The choosing alone: it finds what lowers the held-out loss, and goes on where it stopped."""

import math

import pytest
import torch

from optima_core import Balancer, BanditConfig, RewardConfig
from optima_core.reward import RewardMeter


def test_the_loss_that_helps_is_chosen_more_often() -> None:
    balancer, loss, pulls = Balancer(["helps", "idles"]), 10.0, {"helps": 0, "idles": 0}
    balancer.observe(loss)
    for _ in range(60):
        (name,) = balancer.chosen()
        pulls[name] += 1
        loss *= 0.95 if name == "helps" else 1.0
        balancer.observe(loss)
    assert pulls["helps"] > 40
    assert balancer.rounds == 60
    assert balancer.posterior()["helps"][0] > balancer.posterior()["idles"][0]


def test_it_is_the_engines_policy_and_reward(seed: int) -> None:
    bandit, reward = BanditConfig("kalman_thompson"), RewardConfig(kind="relative")
    balancer = Balancer(["a", "b", "c"], bandit, reward, seed=seed)
    policy, meter = bandit.make(3), RewardMeter(reward)
    state, losses = policy.init(1, seed), torch.rand(20, 1, 2, dtype=torch.float64) + 1
    seen = meter.init(losses[0])
    balancer.observe(dict(zip("xy", losses[0, 0].tolist(), strict=True)))
    for found in losses[1:]:
        arm, state = policy.select(state)
        assert balancer.chosen() == ("abc"[int(arm)],)
        expected, seen = meter.measure(seen, found)
        state = policy.update(state, arm, expected)
        assert balancer.observe({"y": float(found[0, 1]), "x": float(found[0, 0])}) == float(expected)


def test_weights_stay_until_the_round_ends() -> None:
    balancer = Balancer(["a", "b"], BanditConfig("uniform"), seed=3)
    assert balancer.observe(1.0) == 0.0
    assert all(balancer.weights() == balancer.weights() for _ in range(3))
    chosen = set()
    for _ in range(20):
        assert sorted(balancer.weights().values()) == [0.0, 1.0]
        chosen |= set(balancer.chosen())
        balancer.observe(1.0)
    assert chosen == {"a", "b"}


def test_sets_of_losses_and_all_of_them() -> None:
    subsets = Balancer(["a", "b"], BanditConfig(arms="subsets"))
    assert subsets.policy.arms == 3
    assert sum(Balancer(["a", "b"], BanditConfig("all_modules")).weights().values()) == 2


def test_a_resumed_balancer_goes_on_as_if_it_had_not_stopped(seed: int) -> None:
    first, second = Balancer(["a", "b"], seed=seed), Balancer(["a", "b"], seed=seed + 1)
    losses = torch.rand(20).tolist()
    for loss in losses[:10]:
        first.observe(loss)
        first.weights()
    second.load_state_dict(first.state_dict())
    for loss in losses[10:]:
        assert first.weights() == second.weights()
        assert first.observe(loss) == second.observe(loss)


def test_mistakes_are_said() -> None:
    with pytest.raises(ValueError, match="different names of losses"):
        Balancer(["a", "a"])
    with pytest.raises(ValueError, match="different names of losses"):
        Balancer([])
    balancer = Balancer(["a"])
    with pytest.raises(ValueError, match="finite, got nan"):
        balancer.observe(math.nan)
    balancer.observe(1.0)
    with pytest.raises(ValueError, match="as many losses"):
        balancer.observe({"x": 1.0, "y": 2.0})
