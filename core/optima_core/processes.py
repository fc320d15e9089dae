"""This process among those that torchrun started, as far as it is known without torch."""

import os
import sys
from datetime import timedelta
from typing import Literal, NoReturn

Strategy = Literal["ddp", "fsdp", "hsdp"]


def count_processes() -> int:
    """How many torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_neighbours() -> int:
    """How many torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def several() -> bool:
    """Whether torchrun started more processes than this one."""
    return count_processes() > 1


def attempt() -> int:
    """How often torchrun has started the processes anew, because one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def starts_anew() -> bool:
    """Whether torchrun is to start the processes once more if one is lost (`--max-restarts`)."""
    return attempt() < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def launcher() -> str:
    """The torchrun that started this process, the same after every restart; "" without one.

    Agents on several machines share the name that they were given (`--rdzv-id`), and count restarts each for itself.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # What has no name of its own is of this machine.
    return f"{name} of {os.getppid()}" if name == "none" else name


def speaks() -> bool:
    """Whether this process is to tell why the run ends: the first that asks, for the others end for the same reason."""
    if not several():
        return True
    import torch

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        return store.add(f"optima/told/{attempt()}", 1) == 1
    except RuntimeError:  # the store has gone with the process that held it
        return True


def leave(status: int) -> NoReturn:
    """Ends a process that was one of several, at once.

    With torch 2.13 the interpreter's own shutdown after gloo and DTensors hung or aborted in some of our runs, when all
    work was done and the process group destroyed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
