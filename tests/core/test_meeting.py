"""Ranks that were started anew meet each other, and never what those before them left in the store."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from optima_core.meeting import meet

PATIENCE = 60.0


def client(port: int, seconds: float = PATIENCE) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=seconds))


def meet_all(port: int, delays: list[float]) -> list[dist.PrefixStore]:
    """The parts of the store that as many ranks come to; each comes after its delay."""
    found: dict[int, dist.PrefixStore] = {}

    def come(rank: int) -> None:
        time.sleep(delays[rank])
        found[rank] = meet(client(port), rank, len(delays), PATIENCE)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(delays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(delays))]


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("delays", [[0, 0.3, 0.2], [0.3, 0, 0.1]])
def test_ranks_of_each_start_share_what_no_other_start_sees(delays: list[float], server: dist.TCPStore) -> None:
    for start in range(3):
        stores = meet_all(server.port, delays)
        for rank, store in enumerate(stores):
            assert not store.check([f"place of {(rank + 1) % 3}"]) or rank == 2, "of an earlier start"
            store.set(f"place of {rank}", f"{start}")
        assert {store.get(f"place of {rank}") for store in stores for rank in range(3)} == {b"%d" % start}
        # One that is lost as soon as it has asked, and another one that has not come so far.
        client(server.port).set("optima/asks/1", "nobody")


def test_ranks_that_do_not_come_are_named(server: dist.TCPStore) -> None:
    with pytest.raises(dist.DistError, match=r"ranks \[1, 2\] did not come"):
        meet(client(server.port), 0, 3, 0.1)
    with pytest.raises(dist.DistError):
        meet(client(server.port, 0.1), 1, 3, 0.1)


def test_a_process_of_its_own_waits_for_nobody(server: dist.TCPStore) -> None:
    assert not meet(client(server.port), 0, 1, 0.1).check(["anything"])
