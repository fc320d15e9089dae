"""The training stream: each record once an epoch on any number of ranks, by the step alone, in blocks of shards."""

import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from optima.data import order as module
from optima.data.order import Order, Place


def drawn_sizes(draws: random.Random) -> list[int]:
    return [draws.choice([0, 1, 2, draws.randrange(3, 40)]) for _ in range(draws.randrange(2, 30))] + [17, 9]


def blocks(monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    """Makes blocks of so many records, of whatever number there is."""
    monkeypatch.setattr(module, "WHOLE", 0)
    monkeypatch.setattr(module, "BLOCK", records)


def stream(order: Order, steps: int) -> list[Place]:
    return [place for step in range(steps) for place in order.step(step)]


def test_up_to_a_million_records_are_one_permutation_an_epoch(seed: int) -> None:
    """As numpy draws it from (seed, epoch), whether they lie in shards or not."""
    draws = random.Random(seed)
    for shards in ((), [5, 8]):
        found = stream(Order(13, 4, seed, shards=shards), 30)
        expected = []
        for epoch in range(10):
            key = np.array([seed, 2**63 + epoch], dtype=np.uint64)
            expected += [Place(epoch, int(n)) for n in np.random.Generator(np.random.Philox(key=key)).permutation(13)]
        assert found == expected[:120]
    step = draws.randrange(10**6)
    assert Order(13, 4, seed).step(step) == Order(13, 4, seed, shards=[6, 7]).step(step)


def test_blocks_of_shards_hold_every_record_once_an_epoch(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draws = random.Random(seed)
    for _ in range(20):
        sizes = drawn_sizes(draws)
        records, whole = sum(sizes), draws.randrange(1, 25)
        blocks(monkeypatch, whole)
        batch = draws.randrange(1, 7)
        places = stream(Order(records, batch, seed, shards=sizes), -(-3 * records // batch))
        epochs = [[place.record for place in places if place.epoch == epoch] for epoch in range(3)]
        assert all(sorted(epoch) == list(range(records)) for epoch in epochs)
        shard_of = np.repeat(np.arange(len(sizes)), sizes)
        for epoch in epochs:
            # Between the first and the last record of a shard there is no more than its block.
            for shard in range(len(sizes)):
                at = [place for place, record in enumerate(epoch) if shard_of[record] == shard]
                assert not at or at[-1] - at[0] < whole + max(sizes)


def test_another_number_of_ranks_divides_the_same_stream(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draws = random.Random(seed)
    blocks(monkeypatch, 20)
    sizes = drawn_sizes(draws)
    one = stream(Order(sum(sizes), 12, seed, shards=sizes), 20)
    for ranks in (2, 3, 4):
        orders = [Order(sum(sizes), 12 // ranks, seed, rank, ranks, sizes) for rank in range(ranks)]
        assert [place for step in range(20) for order in orders for place in order.step(step)] == one


def test_any_step_comes_without_those_before(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draws = random.Random(seed)
    blocks(monkeypatch, 20)
    sizes = drawn_sizes(draws)
    walked = Order(sum(sizes), 5, seed, shards=sizes)
    whole = [walked.step(step) for step in range(60)]
    for step in draws.sample(range(60), 20):
        assert Order(sum(sizes), 5, seed, shards=sizes).step(step) == whole[step]


def test_epochs_and_seeds_differ_and_records_of_a_block_are_mixed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    blocks(monkeypatch, 500)
    sizes = [100] * 20
    rows = [[place.record for place in stream(Order(2000, 50, s, shards=sizes), 80)] for s in (seed, seed + 1)]
    assert len({tuple(row[first : first + 2000]) for row in rows for first in (0, 2000)}) == 4
    shards = Counter(record // 100 for record in rows[0][:50])
    assert len(shards) == 5
    first_of_pair = sum(a < b for a, b in zip(rows[0][:-1], rows[0][1:], strict=True))
    assert 0.4 < first_of_pair / 4000 < 0.6


def test_memory_does_not_grow_with_the_records(seed: int) -> None:
    peaks = []
    for shards in (200, 2000):
        tracemalloc.start()
        Order(shards * 10_000, 32, seed, shards=[10_000] * shards).step(10**6)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] + 2**17
