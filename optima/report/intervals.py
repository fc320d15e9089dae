"""Means with confidence intervals, and paired differences, of scores over seeds.

Policies are compared seed by seed: runs of one seed share their start and their data, so the difference of a pair is
far less noisy than the difference of two means. With a handful of seeds the interval must be Student's t.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean of `count` values and half the width of its confidence interval (NaN for a single value)."""

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean: s / sqrt(n) times the two-sided quantile at n - 1 degrees of freedom.

    Raises:
        ValueError: there are no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("values: none given; a mean needs one or more")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, two_sided_t(confidence, count - 1) * math.sqrt(variance / count), count)


def paired_difference(
    scores: Mapping[int, float], reference: Mapping[int, float], confidence: float = 0.95
) -> Interval | None:
    """The interval of the mean of score minus reference over the seeds both have; None where they share none."""
    shared = sorted(scores.keys() & reference.keys())
    return mean_interval([scores[seed] - reference[seed] for seed in shared], confidence) if shared else None


def two_sided_t(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = `confidence` for Student's T with a whole number of degrees of freedom.

    For whole degrees the probability is a finite sum in theta = atan(t / sqrt(degrees)): Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4. It rises with theta, so bisection inverts it.

    Raises:
        ValueError: `confidence` is not within (0, 1), or `degrees` is less than 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} given; a number between 0 and 1 is needed")
    if degrees < 1:
        raise ValueError(f"degrees: {degrees} given; 1 or more are needed")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _probability_within(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _probability_within(theta: float, degrees: int) -> float:
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for step in range(2 + odd, degrees - 1, 2):
        term *= (step - 1) / step * cosine**2
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
