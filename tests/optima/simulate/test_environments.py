import math

import numpy as np
import pytest
import torch

from optima.simulate.environments import ENVIRONMENTS, Abrupt, Distil, Sine


def one_hot(arm: int, seeds: int, arms: int) -> torch.Tensor:
    return torch.eye(arms, dtype=torch.float64)[arm].expand(seeds, arms)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_worlds_do_not_depend_on_how_many_run_beside_them(name, seed):
    environment = ENVIRONMENTS[name](4, 100)
    few, many = environment.init(2, seed), environment.init(9, seed)
    for t in range(30):
        # Powers, logarithms and sines of whole vectors and of their tails differ in the last bits on a CPU.
        for draw in (environment.expected_reward, environment.draw_noise):
            torch.testing.assert_close(draw(few), draw(many)[:2], rtol=1e-12, atol=1e-14)
        few = environment.advance(few, one_hot(t % 4, 2, 4))
        many = environment.advance(many, one_hot(t % 4, 9, 4))


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_noise_does_not_depend_on_what_is_pulled(name, seed):
    environment = ENVIRONMENTS[name](3, 50)
    left, right = environment.init(5, seed), environment.init(5, seed)
    for _ in range(10):
        left, right = environment.advance(left, one_hot(0, 5, 3)), environment.advance(right, one_hot(2, 5, 3))
        assert torch.equal(environment.draw_noise(left), environment.draw_noise(right))


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_noise_has_its_standard_deviation(name, seed):
    environment = ENVIRONMENTS[name](5, 50)
    noise = environment.draw_noise(environment.init(20_000, seed))
    assert noise.std().item() == pytest.approx(environment.noise, rel=0.02)


def test_abrupt_means_change_between_segments_only(seed):
    environment = Abrupt(3, 50)
    state, means = environment.init(1000, seed), []
    for _ in range(50):
        means.append(environment.expected_reward(state))
        state = environment.advance(state, one_hot(0, 1000, 3))
    segments = torch.stack(means).reshape(5, 10, 1000, 3)
    assert (segments == segments[:, :1]).all()
    first = segments[:, 0]
    assert (first[1:] != first[:-1]).all()
    # U[0, 1]: mean 1/2 and variance 1/12, within six standard errors of 15000 draws.
    assert first.mean().item() == pytest.approx(0.5, abs=6 * math.sqrt(1 / 12 / 15_000))
    assert first.var().item() == pytest.approx(1 / 12, rel=0.06)


def test_sine_follows_its_formula(seed):
    environment = Sine(4, 300)
    state = environment.init(3, seed)
    start = environment.expected_reward(state).numpy()
    # sin and cos of each seed's phase, from the first arm at t = 0 and a quarter of a period later.
    for _ in range(250):
        state = environment.advance(state, one_hot(0, 3, 4))
    quarter = environment.expected_reward(state).numpy()
    phase = np.arctan2(start[:, :1] - 0.5, quarter[:, :1] - 0.5)
    expected = 0.5 + 0.4 * np.sin(2 * np.pi * np.arange(4) / 4 + phase)
    np.testing.assert_allclose(start, expected, atol=1e-12)


@pytest.mark.parametrize("transfer", [0.0, 0.5])
def test_distil_follows_its_formula(seed, transfer):
    environment = Distil(3, 100, transfer=transfer)
    state = environment.init(2, seed)
    initial, rate, recovery = (state[name].numpy() for name in ("initial", "rate", "recovery"))
    assert ((initial >= 0.5) & (initial <= 2)).all()
    assert ((rate >= 2e-4) & (rate <= 2e-2)).all()
    assert ((recovery >= 1e-4) & (recovery <= 2e-3)).all()
    loss = initial.copy()
    for arm in np.random.default_rng(seed).integers(0, 3, 60):
        decrement = rate[:, arm] * loss[:, arm]
        np.testing.assert_allclose(environment.expected_reward(state)[:, arm].numpy(), decrement, rtol=1e-9)
        state = environment.advance(state, one_hot(int(arm), 2, 3))
        for other in range(3):
            drop = decrement if other == arm else transfer * decrement * loss[:, other] / initial[:, other]
            loss[:, other] -= drop
        loss += recovery * (initial - loss)
