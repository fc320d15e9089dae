"""How the attention-map kernels are cut into tiles, on which chip."""

from typing import NamedTuple

import torch


class Tiling(NamedTuple):
    """Queries and keys of a tile, and what the compiler is told."""

    queries: int
    keys: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        return {"BI": self.queries, "BJ": self.keys, "num_warps": self.warps, "num_stages": self.stages}


class Tiles(NamedTuple):
    """A tiling for each kernel."""

    lse: Tiling
    query: Tiling
    key: Tiling
    mean: Tiling


def tiles_of(target: str, width: int, dtype: torch.dtype) -> Tiles | None:
    """The tilings for "sm_80", ..., "gfx942" or "interpreter"; None where the kernels do not fit the chip.

    `width` is the wider side's padded head width, `dtype` the wider dtype. Fixed, not tuned at run time.
    """
    if target == "interpreter":
        return Tiles(*(Tiling(32, 32, 4, 1),) * 4)
    if dtype == torch.float32:
        return Tiles(*(Tiling(32, 32, 4, 1),) * 4)
    if width <= 64:
        return Tiles(Tiling(128, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(128, 64, 4, 2))
    return Tiles(Tiling(128, 64, 4, 2), Tiling(64, 32, 4, 2), Tiling(32, 64, 4, 2), Tiling(64, 64, 4, 2))


def padded(width: int) -> int:
    """Head width as a tile has it: a power of two that a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())
