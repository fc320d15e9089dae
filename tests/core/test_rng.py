import math
import random

import pytest
import torch

from optima_core.rng import make_keys, normal, random_words, threefry_2x32, uniform


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().randrange(2**64)


# The known answers of the authors' Random123 (kat_vectors, "threefry2x32 20"): key, counter, result.
@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_answers(key, counter, answer):
    words = threefry_2x32(*(torch.tensor(word) for word in (*key, *counter)))
    assert tuple(word.item() for word in words) == answer


def threefry_in_python_integers(key, counter):
    """As the paper writes it: 20 rounds, a key injection after every fourth."""
    schedule = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x = [(counter[0] + key[0]) % 2**32, (counter[1] + key[1]) % 2**32]
    for i in range(20):
        rotation = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        x[0] = (x[0] + x[1]) % 2**32
        x[1] = ((x[1] << rotation | x[1] >> (32 - rotation)) % 2**32) ^ x[0]
        if i % 4 == 3:
            s = i // 4 + 1
            x[0] = (x[0] + schedule[s % 3]) % 2**32
            x[1] = (x[1] + schedule[(s + 1) % 3] + s) % 2**32
    return tuple(x)


def test_threefry_equals_integer_arithmetic_on_random_inputs(seed):
    inputs = torch.randint(0, 2**32, (4, 200), generator=torch.Generator().manual_seed(seed % 2**63))
    words = torch.stack(threefry_2x32(*inputs)).T.tolist()
    for row, (k_0, k_1, c_0, c_1) in zip(words, inputs.T.tolist(), strict=True):
        assert tuple(row) == threefry_in_python_integers((k_0, k_1), (c_0, c_1)), f"seed {seed}"


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
