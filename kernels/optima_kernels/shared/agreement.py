"""One verdict for all ranks of a job: none of them falls back alone.

Ranks run the same step, so they ask the same question at about the same time. Each puts what it found into the job's
store; the last to come decides for all, by what is worst. Where ranks run different steps nobody comes: the wait ends
after `WAIT_SECONDS`, what has come by then decides, and the process does not wait again.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

WAIT_SECONDS = 60.0

_others_come = True


@dataclass(frozen=True)
class Agreement:
    """The finding that holds for all, the rank that it is of (None without a job), and whether to speak of it here."""

    finding: str
    rank: int | None
    says: bool


def agreed(question: str, finding: str, severity: Callable[[str], int]) -> Agreement:
    """The worst finding of all ranks that asked in time; of the first to decide, for those that come later.

    Args:
        question: the same on all ranks; not to be asked from several threads at once.
        severity: of a finding; the largest prevails, of the lowest rank where some are equal.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Agreement(finding, None, says=True)
    store = torch.distributed.distributed_c10d._get_default_store()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    place = f"optima_kernels/{question}"

    is_last = False
    if not store.check([f"{place}/{rank}"]):
        store.set(f"{place}/{rank}", finding)
        is_last = store.add(f"{place}/count", 1) == ranks
    if not is_last:
        _wait(store, f"{place}/decision")

    decision = ""
    if not store.check([f"{place}/decision"]):
        found = {i: store.get(f"{place}/{i}").decode() for i in range(ranks) if store.check([f"{place}/{i}"])}
        worst = max(found, key=lambda i: severity(found[i]))
        decision = f"{worst} {min(found)} {found[worst]}"
    decision = store.compare_set(f"{place}/decision", "", decision).decode()
    whose, speaker, held = decision.split(" ", 2)
    return Agreement(held, int(whose), says=int(speaker) == rank)


def _wait(store: "Store", key: str) -> None:
    """Until the key is there, if that comes to pass."""
    global _others_come
    if _others_come:
        with suppress(torch.distributed.DistStoreError):
            store.wait([key], timedelta(seconds=WAIT_SECONDS))
        _others_come = store.check([key])
