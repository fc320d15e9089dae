"""Confidence intervals against published quantiles, direct integration of the density, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optima.report.intervals import mean_interval, paired_difference, two_sided_t


@pytest.mark.parametrize(
    ("degrees", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_agree_with_the_printed_table(degrees: int, published: float) -> None:
    assert two_sided_t(0.95, degrees) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 12, 33])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_density_between_the_quantiles_integrates_to_the_confidence(degrees: int, confidence: float) -> None:
    edge = two_sided_t(confidence, degrees)
    # x = sinh(u) spreads the heavy tails evenly over the nodes.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    reach = math.asinh(edge)
    x, dx = np.sinh(reach * nodes), reach * np.cosh(reach * nodes) * weights
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert float(dx @ density) == pytest.approx(confidence, abs=1e-9)


def test_interval_covers_the_true_mean_as_often_as_it_says(seed: int) -> None:
    samples = np.random.default_rng(seed).normal(3.0, 2.0, size=(4000, 5))
    covered = np.mean([interval.low <= 3.0 <= interval.high for interval in map(mean_interval, samples.tolist())])
    assert abs(covered - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 4000), f"seed {seed}"


def test_interval_of_known_values() -> None:
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3.0
    assert interval.half_width == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)


def test_single_value_has_a_mean_but_no_width() -> None:
    interval = mean_interval([0.7])
    assert interval.mean == 0.7
    assert math.isnan(interval.half_width)


def test_pairing_removes_what_the_seeds_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference = {k: float(rng.normal(0.5, 0.2)) for k in range(5)}
    better = {k: value + 0.01 for k, value in reference.items()}
    difference = paired_difference(better, reference)
    assert difference is not None
    assert difference.mean == pytest.approx(0.01)
    assert difference.half_width < 1e-12, f"seed {seed}"


def test_only_shared_seeds_are_paired() -> None:
    difference = paired_difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.0, 7: 0.0})
    assert difference is not None
    assert difference.count == 2
    assert difference.mean == 0.75
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: mean_interval([]), "values: none given"),
        (lambda: two_sided_t(1.0, 4), "confidence: 1.0 given"),
        (lambda: two_sided_t(0.95, 0), "degrees: 0 given"),
    ],
)
def test_wrong_arguments_are_named(call, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()
