"""What an item is told, and what it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Context:
    """Where items run.

    rehearse: tiny shapes, on a CPU in Triton's interpreter, which prove no speed.
    warm: only compile, so that a later process finds everything compiled.
    """

    device: torch.device
    rehearse: bool
    seed: int = 0
    warm: bool = False

    def finish(self) -> None:
        """Waits for the device, so that a fault shows in the item that made it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Item(NamedTuple):
    """`run` returns what is to be kept; it raises where something is wrong."""

    name: str
    run: Callable[[], dict[str, Any]]


class Wrong(Exception):
    """A result that is not what it should be; the text says how."""
