import math

import numpy as np
import pytest
import torch

from optima_core import DistillerConfig, RewardConfig
from optima_core.reward import RewardMeter, absolute_decrement, relative_decrement


def meter_of(**options):
    """Of relative decrements as they are, unless the options say otherwise."""
    return RewardMeter(RewardConfig(**{"kind": "relative", "normaliser": "none"} | options))


def test_a_meter_alone_measures_as_the_engine_does() -> None:
    assert RewardMeter().config == DistillerConfig().reward == RewardConfig()


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def descending_losses(rng, rounds=60, batch=3, losses=4):
    """[rounds, batch, losses] of losses that mostly fall and spread over two decades."""
    scale = 10 ** rng.uniform(-1, 1, (1, batch, losses))
    return scale * np.exp(-0.02 * np.arange(rounds))[:, None, None] * rng.uniform(0.9, 1.1, (rounds, batch, losses))


def decrements(losses, floor=0.3):
    """The relative decrement of each round by its definition, in numpy: [rounds - 1, batch]."""
    before, after = losses[:-1], losses[1:]
    return ((before - after) / (before + floor * losses[:1])).mean(axis=-1)


def measured_rewards(meter, losses):
    state = meter.init(torch.from_numpy(losses[0]))
    rewards = []
    for after in losses[1:]:
        reward, state = meter.measure(state, torch.from_numpy(after))
        rewards.append(reward.numpy())
    return np.stack(rewards)


def test_relative_decrement_follows_its_definition(rng):
    losses = descending_losses(rng)
    rewards = measured_rewards(meter_of(floor=0.5), losses)
    np.testing.assert_allclose(rewards, decrements(losses, floor=0.5), rtol=1e-12)


def test_absolute_decrement_follows_its_definition(rng):
    losses = descending_losses(rng)
    expected = (losses[:-1] - losses[1:]).sum(axis=-1) / losses[0].sum(axis=-1)
    np.testing.assert_allclose(measured_rewards(meter_of(kind="absolute"), losses), expected, rtol=1e-9)
    np.testing.assert_allclose(measured_rewards(meter_of(kind="absolute"), 1000 * losses), expected, rtol=1e-9)


def test_relative_decrement_does_not_depend_on_the_scale_of_a_loss(rng):
    losses = descending_losses(rng)
    scale = 10 ** rng.uniform(-3, 3, losses.shape[-1])
    np.testing.assert_allclose(
        measured_rewards(meter_of(), losses * scale), measured_rewards(meter_of(), losses), rtol=1e-9
    )


def test_rewards_are_clipped():
    soared, fell = torch.tensor([[100.0]]), torch.tensor([[1.0]])
    assert relative_decrement(fell, soared, fell, clip=0.5).item() == -0.5
    assert absolute_decrement(soared, fell, fell, clip=2.0).item() == 2.0


def test_a_loss_that_is_zero_from_the_start_gives_no_reward():
    nothing = torch.zeros(1, 2)
    assert relative_decrement(nothing, nothing, nothing).item() == 0.0
    assert absolute_decrement(nothing, nothing, nothing).item() == 0.0


def test_nan_loss_is_not_hidden():
    meter = meter_of()
    reward, _ = meter.measure(meter.init(torch.ones(1, 2)), torch.tensor([[1.0, math.nan]]))
    assert reward.isnan().all()


def test_baseline_subtracts_the_discounted_mean(rng):
    losses = descending_losses(rng)
    raw = decrements(losses)
    weights = 0.9 ** np.arange(len(raw))
    expected = [r - (weights[: t + 1, None] * raw[t::-1]).sum(0) / weights[: t + 1].sum() for t, r in enumerate(raw)]
    np.testing.assert_allclose(measured_rewards(meter_of(baseline=True, gamma=0.9), losses), expected, atol=1e-12)


def test_ratio_divides_by_the_discounted_mean_size(rng):
    losses = descending_losses(rng)
    raw = decrements(losses)
    weights = 0.9 ** np.arange(len(raw))
    sizes = [(weights[: t + 1, None] * abs(raw[t::-1])).sum(0) / weights[: t + 1].sum() for t in range(len(raw))]
    rewards = measured_rewards(meter_of(normaliser="ratio", gamma=0.9), losses)
    np.testing.assert_allclose(rewards, raw / sizes, rtol=1e-9)


@pytest.mark.parametrize("normaliser", ["ratio", "zscore", "quantile"])
def test_losses_that_stand_still_earn_nothing(normaliser):
    meter = meter_of(normaliser=normaliser)
    reward, _ = meter.measure(meter.init(torch.ones(1, 2)), torch.ones(1, 2))
    assert reward.item() == 0.0


def test_zscore_divides_by_the_discounted_standard_deviation(rng):
    losses = descending_losses(rng)
    raw = decrements(losses)
    weights = 0.9 ** np.arange(len(raw))
    rewards = measured_rewards(meter_of(normaliser="zscore", gamma=0.9), losses)
    assert (rewards[0] == 0).all()
    for t in range(1, len(raw)):
        past, weight = raw[t::-1], weights[: t + 1, None] / weights[: t + 1].sum()
        mean = (weight * past).sum(0)
        std = np.sqrt((weight * (past - mean) ** 2).sum(0))
        np.testing.assert_allclose(rewards[t], (raw[t] - mean) / std, rtol=1e-6)


def test_zscore_of_rewards_all_alike_is_zero():
    meter = meter_of(kind="absolute", normaliser="zscore")
    state = meter.init(torch.tensor([[8.0]]))
    for loss in (7.9, 7.8, 7.7, 7.6):
        reward, state = meter.measure(state, torch.tensor([[loss]], dtype=torch.float64))
        assert abs(reward.item()) < 3


@pytest.mark.parametrize("window", [1, 7, 200])
def test_quantile_maps_the_middle_of_the_window_to_minus_one_to_one(rng, window):
    losses = descending_losses(rng)
    raw = decrements(losses)
    rewards = measured_rewards(meter_of(normaliser="quantile", window=window), losses)
    for t in range(len(raw)):
        past = np.sort(raw[max(0, t + 1 - window) : t + 1], axis=0)
        rank = (len(past) - 1) // 5
        low, high = past[rank], past[len(past) - 1 - rank]
        with np.errstate(invalid="ignore"):
            expected = np.where(high > low, np.clip(2 * (raw[t] - low) / (high - low) - 1, -1, 1), 0.0)
        np.testing.assert_allclose(rewards[t], expected, atol=1e-9)


def test_training_losses_of_idle_modules_do_not_count(rng):
    meter = meter_of(smoothing=0.0)
    state = meter.init_unmeasured(1, 2)
    first = torch.tensor([[True, False]])
    for loss in (4.0, 3.0):
        state = meter.observe(state, torch.tensor([[loss, math.nan]]), first)
    reward, state = meter.finish(state)
    assert reward.item() == pytest.approx((4 - 3) / (4 + 0.3 * 4) / 2)
    reward, state = meter.finish(state)
    assert reward.item() == 0.0
    for loss in (10.0, 9.0):
        state = meter.observe(state, torch.tensor([[math.nan, loss]]), ~first)
    assert meter.finish(state)[0].item() == pytest.approx((10 - 9) / (10 + 0.3 * 10) / 2)


def test_training_losses_are_smoothed_over_the_steps(rng):
    losses = rng.uniform(1, 2, 30)
    meter = meter_of(smoothing=0.8, floor=0.0)
    state = meter.init_unmeasured(1, 1)
    level = losses[0]
    for loss in losses:
        state = meter.observe(state, torch.tensor([[loss]]), torch.tensor([[True]]))
    for loss in losses[1:]:
        level = 0.8 * level + 0.2 * loss
    assert meter.finish(state)[0].item() == pytest.approx((losses[0] - level) / losses[0])


def test_compiled_rewards_equal_eager_rewards(rng):
    # One graph for all normalisers, because compiling is what takes time.
    meters = [meter_of(baseline=True, normaliser=kind, window=8) for kind in ("none", "ratio", "zscore", "quantile")]

    def measure_all(states, losses):
        return [meter.measure(state, losses) for meter, state in zip(meters, states, strict=True)]

    losses = torch.from_numpy(descending_losses(rng, rounds=20))
    compiled = torch.compile(measure_all, fullgraph=True)
    ours = theirs = [meter.init(losses[0]) for meter in meters]
    for after in losses[1:]:
        measured, expected = compiled(ours, after), measure_all(theirs, after)
        for (reward, _), (eager_reward, _) in zip(measured, expected, strict=True):
            torch.testing.assert_close(reward, eager_reward, rtol=1e-9, atol=1e-12)
        ours, theirs = ([state for _, state in outcome] for outcome in (measured, expected))
