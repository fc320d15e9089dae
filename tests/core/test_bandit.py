"""What holds for every policy, and what each of them is for, against numpy and against simple worlds."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from optima_core.bandit import (
    CATALOGUE,
    LEVELS,
    POLICIES,
    Policy,
    State,
    arm_strengths,
    belief_names,
    count_arms,
    make_policy,
)
from optima_core.bandit.arms import arm_of_levels
from optima_core.bandit.catalogue import FACTORED, discounts_rewards
from optima_core.bandit.statistics import DiscountedBelief
from optima_core.rng import make_keys, normal

ARMS = 5
ADAPTIVE = (
    "discounted_thompson",
    "sliding_window_thompson",
    "kalman_thompson",
    "stationary_thompson",
    "discounted_ucb",
    "epsilon_greedy",
)
every_policy = pytest.mark.parametrize("name", POLICIES)


def policy_for_test(name: str) -> Policy:
    """`name` with five arms or 64 strengths; a window short enough to wrap, and a minimum share where there is one."""
    changes = {"sliding_window_thompson": {"window": 9}, "discounted_ucb": {"min_share": 0.05}}
    return make_policy(name, arms=64 if name in FACTORED else ARMS, **changes.get(name, {}))


def rewards_of(seed: int, batch: int, rounds: int, arms: int = ARMS) -> torch.Tensor:
    """What each arm would pay, float64 [rounds, batch, arms]: shrinking, on a common offset, like loss decrements."""
    key = make_keys(seed, (batch, arms))
    better = torch.linspace(0, 1, arms, dtype=torch.float64)
    paid = [1e-3 * 0.99**t * (better + 0.3 * normal(key, torch.tensor([t]))) + 0.01 for t in range(rounds)]
    return torch.stack(paid)


def play(policy: Policy, state: State, rewards: torch.Tensor, step=None) -> tuple[torch.Tensor, State]:
    """Arms chosen, int64 [rounds, batch], and the last state; `rewards` [rounds, batch, arms]."""
    arms = []
    for reward in rewards:
        arm, state = policy.select(state)
        state = policy.update(state, arm, reward.gather(1, arm[:, None] % policy.arms)[:, 0])
        arms.append(arm)
    return torch.stack(arms), state


def assert_same_state(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@every_policy
def test_bandits_do_not_depend_on_their_batch(name, seed):
    policy = policy_for_test(name)
    rewards = rewards_of(seed, batch=11, rounds=40, arms=policy.arms)
    arms, state = play(policy, policy.init(11, seed), rewards)
    for i, j in ((0, 1), (3, 8), (10, 11)):
        part = {key: value[i:j] for key, value in policy.init(11, seed).items()}
        part_arms, part_state = play(policy, part, rewards[:, i:j])
        assert torch.equal(part_arms, arms[:, i:j])
        assert_same_state(part_state, {key: value[i:j] for key, value in state.items()})
    assert_same_state(policy.init(4, seed), {key: value[:4] for key, value in policy.init(11, seed).items()})


@every_policy
def test_saved_and_loaded_bandit_goes_on_bit_for_bit(name, seed, tmp_path):
    policy = policy_for_test(name)
    rewards = rewards_of(seed, batch=6, rounds=40, arms=policy.arms)
    arms, state = play(policy, policy.init(6, seed), rewards)
    _, halfway = play(policy, policy.init(6, seed), rewards[:23])
    save_file(halfway, tmp_path / "bandit.safetensors")
    torch.save(halfway, tmp_path / "bandit.pt")
    for loaded in (load_file(tmp_path / "bandit.safetensors"), torch.load(tmp_path / "bandit.pt", weights_only=True)):
        resumed_arms, resumed = play(policy, loaded, rewards[23:])
        assert torch.equal(resumed_arms, arms[23:])
        assert_same_state(resumed, state)


@every_policy
def test_update_and_select_leave_their_input_alone(name, seed):
    policy = policy_for_test(name)
    _, state = play(policy, policy.init(3, seed), rewards_of(seed, batch=3, rounds=12, arms=policy.arms))
    kept = {key: value.clone() for key, value in state.items()}
    arm, after = policy.select(state)
    policy.update(after, arm, torch.ones(3))
    assert_same_state(state, kept)


def test_compiled_policies_choose_the_arms_of_eager_ones(seed):
    # One graph for all policies, because compiling is what takes time.
    policies = [policy_for_test(name) for name in POLICIES]

    def step(states, reward):
        chosen = [policy.select(state) for policy, state in zip(policies, states, strict=True)]
        paid = [reward.gather(1, arm[:, None] % ARMS)[:, 0] for arm, _ in chosen]
        after = [p.update(s, arm, r) for p, (arm, s), r in zip(policies, chosen, paid, strict=True)]
        return torch.stack([arm for arm, _ in chosen]), after

    compiled = torch.compile(step, fullgraph=True)
    eager_states = compiled_states = [policy.init(16, seed) for policy in policies]
    for reward in rewards_of(seed, batch=16, rounds=60):
        eager_arms, eager_states = step(eager_states, reward)
        compiled_arms, compiled_states = compiled(compiled_states, reward)
        assert torch.equal(eager_arms, compiled_arms)
    for ours, theirs in zip(compiled_states, eager_states, strict=True):
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-15)


@every_policy
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_policy_never_looks_at_a_value(name, device):
    policy = policy_for_test(name)
    with FakeTensorMode():
        state = policy.init(4, seed=1, device=device)
        arm, state = policy.select(state)
        state = policy.update(state, arm, torch.zeros(4, device=device))
        mean, std = policy.posterior(state)
    assert arm.shape == (4,)
    assert arm.dtype == torch.int64
    assert mean.shape == std.shape == (4, 3 if name in FACTORED else ARMS)
    assert {value.device.type for value in [arm, mean, std, *state.values()]} == {device}


@every_policy
def test_posterior_is_finite_from_the_first_round(name, seed):
    policy = policy_for_test(name)
    state = policy.init(2, seed)
    for reward in [
        torch.zeros(2, policy.arms, dtype=torch.float64),
        *rewards_of(seed, batch=2, rounds=20, arms=policy.arms),
    ]:
        mean, std = policy.posterior(state)
        assert mean.isfinite().all()
        assert std.isfinite().all()
        assert (std >= 0).all()
        _, state = play(policy, state, reward[None])


@every_policy
def test_every_arm_is_in_range(name, seed):
    policy = policy_for_test(name)
    arms, _ = play(policy, policy.init(8, seed), rewards_of(seed, batch=8, rounds=50, arms=policy.arms))
    assert (arms == -1).all() if name == "all_modules" else ((arms >= 0) & (arms < policy.arms)).all()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_every_arm_is_tried_first(name, seed):
    policy = make_policy(name, arms=ARMS)
    arms, _ = play(policy, policy.init(8, seed), rewards_of(seed, batch=8, rounds=ARMS))
    assert torch.equal(arms, torch.arange(ARMS)[:, None].expand(ARMS, 8))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_best_arm_is_chosen_most_whatever_scale_and_offset(name, seed):
    policy = make_policy(name, arms=ARMS)
    rewards = (rewards_of(seed, batch=32, rounds=300) - 0.01) / (1e-3 * 0.99 ** torch.arange(300)[:, None, None])
    for scale, offset in ((1.0, 0.0), (1e-6, 0.0), (1e-3, 0.02 if name == "epsilon_greedy" else -40.0)):
        arms, _ = play(policy, policy.init(32, seed), scale * rewards + offset)
        assert (arms[100:] == ARMS - 1).double().mean() > 0.6, (scale, offset)


@pytest.mark.parametrize(
    "name", ["discounted_thompson", "sliding_window_thompson", "kalman_thompson", "discounted_ucb"]
)
def test_choices_do_not_change_with_the_scale_and_offset_of_rewards(name, seed):
    policy = make_policy(name, arms=ARMS)
    rewards = rewards_of(seed, batch=16, rounds=100)
    arms, _ = play(policy, policy.init(16, seed), rewards)
    # Powers of two, so that only the policy could round differently.
    moved, _ = play(policy, policy.init(16, seed), 2.0**-20 * rewards)
    assert torch.equal(moved, arms)
    shifted, _ = play(policy, policy.init(16, seed), rewards + 1.0)
    assert (shifted == arms).double().mean() > 0.99


def test_policy_that_forgets_follows_a_change_that_a_stationary_one_sleeps_through(seed):
    rewards = torch.linspace(0, 1, ARMS, dtype=torch.float64) + 0.1 * normal(
        make_keys(seed, (600, 32, ARMS)), torch.tensor([0])
    )
    rewards[400:] = rewards[400:].flip(-1)
    share = {}
    for name in ("discounted_thompson", "stationary_thompson"):
        policy = make_policy(name, arms=ARMS, nu=0.35)
        arms, _ = play(policy, policy.init(32, seed), rewards)
        share[name] = (arms[500:] == 0).double().mean().item()
    assert share["discounted_thompson"] > 0.8 > share["stationary_thompson"], share


@pytest.mark.parametrize("name", ADAPTIVE)
def test_min_share_bounds_how_long_an_arm_waits(name, seed):
    policy = make_policy(name, arms=ARMS, min_share=0.04)
    arms, _ = play(policy, policy.init(8, seed), rewards_of(seed, batch=8, rounds=300))
    span = 25 + ARMS
    for windowed in arms.unfold(0, span, 1):
        assert all((windowed == arm).any(dim=-1).all() for arm in range(ARMS))


def posterior_in_numpy(arms, rewards, gamma, prior_count):
    """Mean and std of `DiscountedThompson` for one bandit, summed from its history with two-pass variances."""
    weight = gamma ** np.arange(len(arms))[::-1]
    pulled = np.eye(ARMS)[arms] * weight[:, None]
    count = pulled.sum(0)
    pooled = (weight * rewards).sum() / weight.sum()
    total = (pulled * rewards[:, None]).sum(0)
    own = total / count
    variance = (weight * (rewards - own[arms]) ** 2).sum() / weight.sum()
    return (total + prior_count * pooled) / (count + prior_count), np.sqrt(variance / (count + prior_count))


def test_discounted_posterior_follows_its_definition(seed):
    rng = np.random.default_rng(seed)
    arms = np.concatenate([np.arange(ARMS), rng.integers(0, ARMS, 80)])
    rewards = rng.normal(1000.0, 1.0, len(arms))
    policy = make_policy("discounted_thompson", arms=ARMS, gamma=0.95, prior_count=0.2)
    state = policy.init(1)
    for arm, reward in zip(arms, rewards, strict=True):
        state = policy.update(state, torch.tensor([arm]), torch.tensor([reward]))
    mean, std = (moment[0].numpy() for moment in policy.posterior(state))
    expected_mean, expected_std = posterior_in_numpy(arms, rewards, 0.95, 0.2)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(std, expected_std, rtol=1e-9)


def test_sliding_window_posterior_is_the_one_of_its_last_rounds(seed):
    rng = np.random.default_rng(seed)
    window = 4 * ARMS
    arms = np.concatenate([rng.permutation(np.repeat(np.arange(ARMS), 4)) for _ in range(3)])
    rewards = rng.normal(5.0, 1.0, len(arms))
    policy = make_policy("sliding_window_thompson", arms=ARMS, window=window)
    state = policy.init(1)
    for arm, reward in zip(arms, rewards, strict=True):
        _, state = policy.select(state)
        state = policy.update(state, torch.tensor([arm]), torch.tensor([reward]))
    mean, std = (moment[0].numpy() for moment in policy.posterior(state))
    expected_mean, expected_std = posterior_in_numpy(arms[-window:], rewards[-window:], 1.0, policy.prior_count)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(std, expected_std, rtol=1e-9)


def test_kalman_mean_is_the_one_of_the_textbook_filter(seed):
    rng = np.random.default_rng(seed)
    arms, rewards = rng.integers(0, ARMS, 100), rng.normal(0.0, 1.0, 100)
    policy = make_policy("kalman_thompson", arms=ARMS, drift=0.05, prior_variance=9.0)
    state = policy.init(1)
    mean, variance = np.full(ARMS, rewards[0]), np.full(ARMS, 9.0)
    for arm, reward in zip(arms, rewards, strict=True):
        state = policy.update(state, torch.tensor([arm]), torch.tensor([reward]))
        variance = np.minimum(variance + 0.05, 9.0)
        gain = variance[arm] / (variance[arm] + 1.0)
        mean[arm] += gain * (reward - mean[arm])
        variance[arm] *= 1.0 - gain
    np.testing.assert_allclose(policy.posterior(state)[0][0].numpy(), mean, rtol=1e-9)
    ratio = policy.posterior(state)[1][0].numpy() / np.sqrt(variance)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    # With rewards of unit noise about a common mean the estimate of sigma is near 1.
    assert 0.6 < ratio[0] < 1.5


def test_exp3s_weights_follow_their_definition(seed):
    rng = np.random.default_rng(seed)
    policy = make_policy("exp3s", arms=ARMS, eta=0.2, alpha=0.01, gamma=1.0)
    state, weight = policy.init(1), np.ones(ARMS)
    rewards = rng.normal(0.0, 1.0, 60)
    for t, reward in enumerate(rewards):
        arm = rng.integers(ARMS)
        probability = 0.8 * weight / weight.sum() + 0.2 / ARMS
        np.testing.assert_allclose(policy.probability(state)[0].numpy(), probability, rtol=1e-9)
        seen = rewards[: t + 1]
        unit = np.clip(0.5 + (reward - seen.mean()) / (4 * seen.std()), 0, 1) if t > 0 else 0.5
        estimate = np.zeros(ARMS)
        estimate[arm] = unit / probability[arm]
        weight = weight * np.exp(0.2 * estimate / ARMS) + math.e * 0.01 / ARMS * weight.sum()
        state = policy.update(state, torch.tensor([arm]), torch.tensor([reward]))


def test_random_policies_draw_their_probabilities(seed):
    n = 100_000
    for policy, expected in (
        (make_policy("uniform", arms=3), 1 / 3),
        (make_policy("exp3s", arms=3), 1 / 3),
    ):
        arm, _ = policy.select(policy.init(n, seed))
        counts = torch.bincount(arm, minlength=3) / n
        assert (counts - expected).abs().max() < 6 * math.sqrt(expected / n)


def test_plain_policies_do_what_they_say(seed):
    rewards = rewards_of(seed, batch=2, rounds=12)
    arms, _ = play(robin := make_policy("round_robin", arms=ARMS), robin.init(2), rewards)
    assert torch.equal(arms[:, 0], torch.arange(12) % ARMS)
    arms, _ = play(fixed := make_policy("fixed_arm", arms=ARMS, arm=3), fixed.init(2), rewards)
    assert (arms == 3).all()


def test_idle_arm_is_forgotten_before_its_count_turns_denormal():
    policy = make_policy("discounted_thompson", arms=2, gamma=0.5)
    state = policy.init(1)
    state = policy.update(state, torch.tensor([1]), torch.tensor([5.0]))
    for _ in range(1200):
        state = policy.update(state, torch.tensor([0]), torch.tensor([1.0]))
    assert state["count"][0, 1] == 0
    assert policy.posterior(state)[0][0, 1] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["modules", "subsets"])
def test_every_arm_of_modules_distils_what_its_name_says(kind):
    names = ["image", "text", "joint"]
    table = arm_strengths(torch.arange(count_arms(3, kind)), 3, kind)
    assert table.dtype == torch.float32
    assert len(table.unique(dim=0)) == len(table)
    assert table.sum(dim=1).min() == 1
    assert torch.equal(arm_strengths(torch.tensor([-1]), 3, kind), torch.ones(1, 3))
    named = belief_names(names, kind)
    assert named[len(table) :] == (["image+text+joint"] if kind == "modules" else [])
    for row, name in zip(table.tolist(), named, strict=False):
        assert name.split("+") == [n for n, strength in zip(names, row, strict=True) if strength == 1]


def test_an_arm_of_strengths_is_a_level_for_every_module():
    table = arm_strengths(torch.arange(count_arms(3, "strengths")), 3, "strengths")
    expected = [[LEVELS[a % 4], LEVELS[a // 4 % 4], LEVELS[a // 16]] for a in range(64)]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(arm_strengths(torch.tensor([-1]), 3, "strengths"), torch.ones(1, 3))
    assert belief_names(["image", "text", "joint"], "strengths") == ["image", "text", "joint"]


def test_levels_have_their_arm(seed):
    levels = torch.randint(4, (50, 20), generator=torch.Generator().manual_seed(seed))
    found = arm_strengths(arm_of_levels(levels), 20, "strengths")
    torch.testing.assert_close(found, torch.tensor(LEVELS)[levels])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "discounted_tompson"}, "unknown policy 'discounted_tompson'; did you mean 'discounted_thompson'"),
        (
            {"name": "thomson"},
            "did you mean 'discounted_thompson', .*, 'stationary_thompson' or 'linear_thompson'",
        ),
        ({"name": "ucb"}, "did you mean 'discounted_ucb'"),
        ({"name": "best"}, "unknown policy 'best'; known: discounted_thompson, "),
        ({"name": "uniform", "arms": 0}, "arms must be at least 1, got 0"),
        ({"name": "discounted_thompson", "gama": 0.9}, "did you mean 'gamma'"),
        ({"name": "discounted_thompson", "gamma": 1.5}, r"gamma must be a number in \[0.5, 1\], got 1.5"),
        ({"name": "discounted_thompson", "nu": math.nan}, "nu must be a number"),
        ({"name": "discounted_ucb", "min_share": 0.5}, "min_share must be at most 1 / arms = 0.3333, got 0.5"),
        ({"name": "sliding_window_thompson", "window": 2.5}, "window must be an integer"),
        ({"name": "fixed_arm", "arm": 3}, r"arm must be in \[0, 2\] with 3 arms, got 3"),
    ],
)
def test_mistake_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**{"arms": 3} | arguments)


def test_batch_kind_and_number_of_modules_are_checked():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        make_policy("uniform", arms=3).init(0)
    with pytest.raises(ValueError, match="arms must be 'modules', 'subsets' or 'strengths', got 'pairs'"):
        count_arms(3, "pairs")
    with pytest.raises(ValueError, match="at most 12 modules"):
        count_arms(13, "subsets")
    with pytest.raises(ValueError, match="at most 31 modules"):
        count_arms(32, "strengths")
    with pytest.raises(ValueError, match="arms must be a power of the 4 strengths"):
        make_policy("linear_thompson", arms=5)
    with pytest.raises(ValueError, match="arms must be at most 4096"):
        make_policy("uniform", arms=4**7)


def test_the_catalogue_is_what_the_policies_have():
    assert list(CATALOGUE) == list(POLICIES)
    for name, policy in POLICIES.items():
        own = {field.name: field for field in fields(policy) if field.init and field.name != "arms"}
        assert CATALOGUE[name].keys() == own.keys()
        for parameter, described in CATALOGUE[name].items():
            assert own[parameter].metadata["hyper_parameter"] is described
            assert own[parameter].default == described.default
            assert own[parameter].type is type(described.default)
        assert discounts_rewards(name) == (
            "gamma" in own and (issubclass(policy, DiscountedBelief) or name in FACTORED)
        )


def test_linear_beliefs_are_the_weighted_least_squares_of_what_was_played(seed):
    policy = make_policy("linear_thompson", arms=16, gamma=0.9, prior_precision=0.2, trust=1.5)
    generator = torch.Generator().manual_seed(seed)
    state, design, paid = policy.init(1, seed), [], []
    for _ in range(40):
        levels = torch.randint(4, (1, 2), generator=generator)
        reward = torch.randn(1, generator=generator, dtype=torch.float64) + 7.0
        design.append([1.0] + [float(levels[0, k] == level) for k in range(2) for level in (1, 2, 3)])
        paid.append(float(reward))
        state = policy.update(state, arm_of_levels(levels), reward)
    weight = 0.9 ** np.arange(39, -1, -1)
    x, y = np.array(design), np.array(paid) - paid[0]  # the first reward is the origin
    gram = x.T @ (weight[:, None] * x) + 0.2 * np.eye(7)
    fit = np.linalg.solve(gram, x.T @ (weight * y))
    sigma = np.sqrt(((weight * y**2).sum() - fit @ (x.T @ (weight * y))) / weight.sum())
    believed = np.array([0, 0, 1, 0, 0, 1, 0]) * 1.5 * sigma
    beta = np.linalg.solve(gram, x.T @ (weight * y) + 0.2 * believed)
    mean, spread = policy.posterior(state)
    np.testing.assert_allclose(mean[0].numpy(), beta[[2, 5]], rtol=1e-8)
    np.testing.assert_allclose(spread[0].numpy(), sigma * np.sqrt(np.linalg.inv(gram).diagonal()[[2, 5]]), rtol=1e-8)


def test_linear_thompson_leaves_nothing_out_without_evidence(seed):
    """Of rewards that are noise, and fall: few modules are left out, and none in the first two rounds."""
    policy = make_policy("linear_thompson", arms=64)
    noise = normal(make_keys(seed, (100, 40)), torch.zeros(1, dtype=torch.int64))
    state, out = policy.init(100, seed), []
    for t in range(40):
        arm, state = policy.select(state)
        out.append((arm_strengths(arm, 3, "strengths") == 0).float().mean().item())
        state = policy.update(state, arm, 0.9**t + 0.3 * noise[:, t])
    assert out[:2] == [0.0, 0.0]
    assert max(out) < 0.25


def test_linear_thompson_finds_the_level_of_each_module(seed):
    """Of 64 arms, from 120 rewards, in most of 40 worlds."""
    policy = make_policy("linear_thompson", arms=64, gamma=0.99, nu=1.0, prior_precision=0.1)
    best = torch.tensor([2, 0, 3])
    state, arms = policy.init(40, seed), []
    noise = normal(make_keys(seed, (40, 120)), torch.zeros(1, dtype=torch.int64))
    for t in range(120):
        arm, state = policy.select(state)
        levels = torch.stack([arm // 4**k % 4 for k in range(3)], dim=-1)
        reward = -((levels - best) ** 2).sum(dim=-1) + 0.5 * noise[:, t]
        state = policy.update(state, arm, reward)
        arms.append(levels)
    right = (torch.stack(arms[-20:]) == best).all(dim=-1)
    assert right.float().mean() > 0.8
