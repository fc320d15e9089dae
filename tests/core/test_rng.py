import math
import random

import pytest
import torch

from optima_core.rng import make_keys, normal, philox_2x32, random_words, uniform


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().randrange(2**64)


# The known answers of the authors' Random123 (kat_vectors, "philox2x32 10"): key, counter, result.
@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        (0x00000000, (0x00000000, 0x00000000), (0xFF1DAE59, 0x6CD10DF2)),
        (0xFFFFFFFF, (0xFFFFFFFF, 0xFFFFFFFF), (0x2C3F628B, 0xAB4FD7AD)),
        (0x13198A2E, (0x243F6A88, 0x85A308D3), (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_philox_gives_the_published_answers(key, counter, answer):
    words = philox_2x32(*(torch.tensor(word) for word in (key, *counter)))
    assert tuple(word.item() for word in words) == answer


def philox_in_python_integers(key, counter_0, counter_1):
    """As the paper writes it, in unbounded integers."""
    for _ in range(10):
        high, low = divmod(0xD256D193 * counter_0, 2**32)
        counter_0, counter_1 = high ^ key ^ counter_1, low
        key = (key + 0x9E3779B9) % 2**32
    return counter_0, counter_1


def test_philox_equals_integer_arithmetic_on_random_inputs(seed):
    inputs = torch.randint(0, 2**32, (3, 500), generator=torch.Generator().manual_seed(seed % 2**63))
    words = torch.stack(philox_2x32(*inputs)).T.tolist()
    for row, problem in zip(words, inputs.T.tolist(), strict=True):
        assert tuple(row) == philox_in_python_integers(*problem), f"seed {seed}"


def test_keys_do_not_depend_on_the_size_of_the_batch(seed):
    keys = make_keys(seed, (6, 3))
    assert torch.equal(make_keys(seed, (4, 2)), keys[:4, :2]), f"seed {seed}"
    assert len(keys.reshape(-1, 2).unique(dim=0)) == 18, f"seed {seed}"


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_seed_out_of_range_is_named(bad):
    with pytest.raises(ValueError, match=rf"seed must be .*, got {bad}"):
        make_keys(bad, (1,))


def test_streams_and_rounds_differ(seed):
    key, first, second = make_keys(seed, (1000,)), torch.tensor(1), torch.tensor(2)
    drawn = torch.cat([torch.stack(random_words(key, t, s)).T for t in (first, second) for s in (0, 1)])
    assert len(drawn.unique(dim=0)) == 4000, f"seed {seed}"


def test_uniform_has_the_moments_of_the_uniform_distribution(seed):
    n = 200_000
    u = uniform(make_keys(seed, (n,)), torch.tensor(3))
    assert u.dtype == torch.float64
    assert ((u > 0) & (u < 1)).all(), f"seed {seed}"
    # Kolmogorov-Smirnov distance; exceeded with probability 2 exp(-2 * 9) = 3e-8.
    ideal = (torch.arange(n) + 0.5) / n
    assert (u.sort().values - ideal).abs().max() < 3 / math.sqrt(n), f"seed {seed}"


def test_normal_has_the_distribution_and_independence_of_the_normal(seed):
    n = 200_000
    key = make_keys(seed, (n,))
    z, later = normal(key, torch.tensor(3)), normal(key, torch.tensor(4))
    ideal = (torch.arange(n) + 0.5) / n
    assert (torch.special.ndtr(z).sort().values - ideal).abs().max() < 3 / math.sqrt(n), f"seed {seed}"
    neighbours, rounds = (z[1:] * z[:-1]).mean(), (z * later).mean()
    # Both are means of n products of variance 1; six standard errors.
    assert abs(neighbours) < 6 / math.sqrt(n), f"seed {seed}"
    assert abs(rounds) < 6 / math.sqrt(n), f"seed {seed}"


def test_compiled_words_equal_eager_words(seed):
    key = make_keys(seed, (33, 7))
    compiled = torch.compile(random_words, fullgraph=True)
    for t in (0, 1, 2**31, 2**32 - 1):
        for ours, eager in zip(compiled(key, torch.tensor([t])), random_words(key, torch.tensor([t])), strict=True):
            assert torch.equal(ours, eager), f"seed {seed}"
