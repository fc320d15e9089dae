"""Where do ranks meet that torchrun has started anew? In its store, which outlives them, apart from what others left.

Gloo and NCCL leave in the store where each process is to be found. torchrun keeps one store for all its restarts, so a
rank that looks there at once may find where another one was before it was lost, and knock there in vain. Nothing that
torchrun tells its processes is the same for all of them and new after every restart: agents on several machines count
their restarts each for itself.
"""

import secrets
import time

from torch.distributed import DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]

_PAUSE = 0.01
"""Seconds between two looks of the first rank."""


def meet(store: Store, rank: int, count: int, timeout: float) -> PrefixStore:
    """A part of the store that these ranks have for themselves; all of them must call this.

    Each other rank asks the first one under a name that nobody had before. The first one answers all that ask, those
    that are long gone as well, until each has said that it has heard.

    Args:
        store: Which all ranks see, and others before them have seen.
        rank: This process, from 0.
        count: How many there are.
        timeout: Seconds that the first rank waits; the others wait as long as the store does.

    Raises RuntimeError (torch.distributed.DistError) if the others do not come.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"optima/asks/{rank}", own)
        name = store.get(f"optima/answers/{rank}/{own}").decode()
        store.set(f"optima/hears/{name}/{rank}", "")
        return PrefixStore(f"optima/{name}", store)
    awaited = set(range(1, count))
    deadline = time.monotonic() + timeout
    while awaited:
        for other in awaited:
            if store.check([f"optima/asks/{other}"]):
                asked = store.get(f"optima/asks/{other}").decode()
                store.set(f"optima/answers/{other}/{asked}", own)
        awaited = {other for other in awaited if not store.check([f"optima/hears/{own}/{other}"])}
        if time.monotonic() > deadline:
            raise DistStoreError(f"ranks {sorted(awaited)} did not come")
        time.sleep(_PAUSE)
    return PrefixStore(f"optima/{own}", store)
