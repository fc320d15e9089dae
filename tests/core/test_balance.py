"""The unit of strength: a running geometric mean of what was measured."""

import itertools
import math
import random

import pytest
import torch

from optima_core.balance import GradientBalance, led_by_layers


def test_a_unit_is_the_running_geometric_mean_of_its_measurements(seed: int) -> None:
    balance = GradientBalance(parts=3, smoothing=0.6)
    state = balance.init()
    assert torch.equal(balance.units(state), torch.ones(3))
    ratios = torch.rand(20, generator=torch.Generator().manual_seed(seed)) * 100 + 0.01
    expected = None
    for ratio in ratios:
        state = balance.observe(state, 1, ratio)
        log = math.log(ratio.item())
        expected = log if expected is None else 0.6 * expected + 0.4 * log
    assert expected is not None
    units = balance.units(state).tolist()
    assert units == [1.0, pytest.approx(math.exp(expected), rel=1e-4), 1.0]


@pytest.mark.parametrize("nothing", [0.0, math.inf, math.nan])
def test_what_could_not_be_measured_changes_nothing(nothing: float) -> None:
    balance = GradientBalance(parts=2)
    state = balance.observe(balance.init(), 0, torch.tensor(5.0))
    after = balance.observe(balance.observe(state, 0, torch.tensor(nothing)), 1, torch.tensor(nothing))
    torch.testing.assert_close(balance.units(after), torch.tensor([5.0, 1.0]))


def test_layers_lead_in_equal_ratios(seed: int) -> None:
    draw = random.Random(seed)
    first, last, rounds = draw.uniform(1, 100), draw.uniform(0.01, 1), draw.randrange(3, 60)
    found = [led_by_layers(first, last, number, rounds) for number in range(rounds + 2)]
    assert found[0] == pytest.approx(first)
    assert found[rounds - 1 :] == [pytest.approx(last)] * 3
    steps = [math.log(after / before) for before, after in itertools.pairwise(found[:rounds])]
    assert steps == [pytest.approx(math.log(last / first) / (rounds - 1))] * (rounds - 1)
    assert led_by_layers(9.0, 4.0, 0, 1) == pytest.approx(6.0)
