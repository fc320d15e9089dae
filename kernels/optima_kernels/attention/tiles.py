"""How the attention-map kernels are cut into tiles, on which chip."""

from typing import NamedTuple

import torch


class Tiling(NamedTuple):
    """Queries and keys of a tile, and what the compiler is told; 0 registers leave their number to it."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0

    def arguments(self) -> dict[str, int]:
        told = {"maxnreg": self.registers} if self.registers else {}
        return {"BI": self.queries, "BJ": self.keys, "num_warps": self.warps, "num_stages": self.stages, **told}


class Tiles(NamedTuple):
    """A tiling for each kernel; those of means take the queries' and the keys'.

    None where a kernel does not fit: those of means, and `online_kernel` where it is asked for gradients.
    """

    lse: Tiling
    query: Tiling
    key: Tiling
    mean: Tiling | None
    online: Tiling | None


# Of `count_kernel`, on every chip: it has no product.
COUNTING = Tiling(32, 64, 4, 1)
# All that there are for a thread.
REGISTERS = 255


def tiles_of(
    target: str, width: int, dtype: torch.dtype, queries: int, *, reads_maps: bool, grouped: bool
) -> Tiles | None:
    """The tilings for "sm_80", ..., "gfx942" or "interpreter"; None where the kernels do not fit the chip.

    `width` is the wider side's padded head width and `dtype` the wider dtype; `reads_maps` says that tiles of something
    of a map's shape are read, a mask that tells elements or quotients, and `grouped` that key heads serve several query
    heads. Then loads are not made ahead, which would cost registers that are not there and, on Hopper, make products
    wait for each other.

    Fixed, not tuned at run time. Four warps wherever products are a warp group's, which that group alone then waits
    for. Measured on an H100 in bfloat16: in `query_kernel` (width 64, 577 tokens) 32 keys in three stages take 0.64 of
    the time of 64 keys in two, because more programs fit a multiprocessor; in `key_kernel` of width 128 (1024 tokens)
    64 queries in two stages take 0.84 of the time of 32 in three, because a key's row is read from shared memory less.

    Where nothing was measured, kernels are told that they may take every register: left to itself, ptxas spills a few
    bytes to stay below 64 or 128. But `online_kernel`, and on sm_120 a `key_kernel` that loads ahead, spill if they are
    told so.
    """
    tiles = _cut(target, width, dtype, queries, reads_maps=reads_maps, grouped=grouped)
    measured = target.startswith("sm_9") and dtype != torch.float32
    if tiles is None or measured or not target.startswith("sm_"):
        return tiles
    lse, query, key = (tiling._replace(registers=REGISTERS) for tiling in tiles[:3])
    mean = None if tiles.mean is None else tiles.mean._replace(registers=REGISTERS)
    chooses = tiles.key.stages > 1 and not target.startswith("sm_10")
    return Tiles(lse, query, tiles.key if chooses else key, mean, tiles.online)


def _cut(target: str, width: int, dtype: torch.dtype, queries: int, *, reads_maps: bool, grouped: bool) -> Tiles | None:
    if target == "interpreter":
        return Tiles(*(Tiling(32, 32, 4, 1),) * 5)
    if dtype == torch.float32:
        if width > 128:
            return None
        # Multiply-adds, whose operands are in registers: no warp group's products to wait for.
        square, low = Tiling(32, 32, 4, 1), Tiling(32, 16, 4, 1)
        if width <= 64:
            return Tiles(low, Tiling(16, 16, 4, 1) if target.startswith("sm_10") else low, square, square, None)
        return Tiles(low, Tiling(32, 16, 8, 1), Tiling(16, 32, 4, 1), None, None)
    if width > 256:
        return None
    if target.startswith("gfx"):
        return Tiles(*(Tiling(32, 64 if width <= 128 else 32, 4, 1),) * 4, None)
    # Where a warp group's products do not read their left side from shared memory, it takes registers.
    roomy = target.startswith("sm_9")
    if width > 128:
        query = Tiling(64 if roomy and not reads_maps else 32, 16, 4, 1, REGISTERS)
        key = Tiling(16, 16 if reads_maps and target.startswith("sm_10") else 32, 4, 1)
        return Tiles(Tiling(64, 32, 4, 1), query, key, Tiling(32, 32, 4, 1), None)
    if width > 64 and reads_maps and not roomy:
        key = Tiling(16, 64, 4, 1) if target.startswith("sm_10") else Tiling(32, 32, 4, 1)
        return Tiles(Tiling(64, 32, 4, 1), Tiling(64, 32, 4, 1), key, Tiling(64, 32, 4, 1), None)
    ahead = 1 if reads_maps else 3
    key = _key_tiling(target, width, dtype, queries, reads_maps=reads_maps, grouped=grouped)
    # Two sums of products: only on Hopper do those of wider heads fit, and of others a third block a multiprocessor.
    online = None
    if not reads_maps and (roomy or width <= 64):
        online = Tiling(64, 32, 4, 3, 168 if roomy and width <= 64 else 0)
    return Tiles(Tiling(64, 64, 4, 2), Tiling(64, 32, 4, ahead), key, Tiling(64, 64, 4, 2), online)


def _key_tiling(
    target: str, width: int, dtype: torch.dtype, queries: int, *, reads_maps: bool, grouped: bool
) -> Tiling:
    """Of `key_kernel` in 16 bits, up to a width of 128."""
    roomy, tensor_memory = target.startswith("sm_9"), target.startswith("sm_10")
    if roomy and not (reads_maps or grouped or dtype == torch.float16):
        if width > 64:
            return Tiling(64, 64, 4, 2)
        # By count a tenth less than in tiles of 32, where queries fill the last one; told so, four blocks fit.
        if queries % 64 == 0 or queries >= 1024:
            return Tiling(64, 64, 4, 2, 128)
    if not (roomy or tensor_memory) and (reads_maps or (width > 64 and grouped)):
        return Tiling(32, 32, 4, 1)
    # On Hopper the gains of float16, multiplied between products, make those that loads are made ahead for wait, too.
    waits = reads_maps or (grouped and (width > 64 or not roomy)) or (roomy and dtype == torch.float16)
    if waits or roomy or tensor_memory:
        return Tiling(32, 64, 4, 1 if waits else 3)
    if target.startswith("sm_8"):  # both limits keep both Triton versions from spilling a few bytes
        return Tiling(32, 64, 4, 2, 176 if width <= 64 else REGISTERS)
    return Tiling(32, 64, 4, 2)


def padded(width: int) -> int:
    """Head width as a tile has it: a power of two that a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())
