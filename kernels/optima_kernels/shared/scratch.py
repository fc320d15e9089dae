"""Memory that tile after tile is worked in."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Buffers that every tile reuses, because fresh memory of this size costs a page fault per 4 KiB."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.buffers: dict[str, Tensor] = {}

    def tile(self, name: str, shape: Sequence[int]) -> Tensor:
        """An uninitialised contiguous tensor; a second one of the same name overwrites the first."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, device=self.device, dtype=self.dtype)
        return self.buffers[name][:size].view(tuple(shape))
