"""Matrix products of hidden states that a gate can stop, and the vendor's where none has to.

For `y = x W^T` and G the gradient in y, `project` makes y, `state_gradients` that of x, G W, and `weight_gradients`
that of W, G^T x. A vendor's product runs whether or not a gate is open, which only the device knows; so gated calls use
the kernels here and others `multiply_into`.

A product with few output tiles is split along the dimension that it sums, so that it fills the chip, and `join_kernel`
adds the parts up in order. How often depends on shapes alone, and every sum is taken in one order: the same input gives
the same bits.

Names as in `optima_kernels.shared.pointers`.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optima_kernels.shared.dispatch import INTERPRETED
from optima_kernels.shared.pointers import is_closed, load_tile, of_layer, store_tile

# What runs at once on an H100: two programs on each of its multiprocessors.
RESIDENT = 264
MOST_SPLITS = 16
# What writing and adding up parts of as many tiles costs, and the launch that adds them up, in steps of the loop:
# estimated, 64 KiB a tile there and back at 3 TB/s beside 0.4 microseconds a step.
JOIN_STEPS, LAUNCH_STEPS = 30, 10
JOINED = 1024


class Tiling(NamedTuple):
    """Rows and columns of an output tile, steps of the summed dimension, and how a program runs."""

    rows: int
    columns: int
    steps: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        return {"BR": self.rows, "BC": self.columns, "BK": self.steps} | {
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def tiling(target: str, narrow: bool, aligned: bool) -> Tiling:
    """The tiling of products for "interpreter", "sm_90" or the like; `narrow` says that operands have 16 bits,
    `aligned` that eight of them can be read at once.

    Fixed, not tuned at run time. Chosen from compiled code: no spilled register on any target. On sm_90 a program has
    one warp group: of two, Triton to 3.7 lets one overwrite operands that the other's products may still read.
    """
    if target == "interpreter":
        return Tiling(32, 32, 32, 4, 1)
    if not narrow:
        # Of 64 rows Triton 3.7 makes tf32 products on sm_100, whatever precision is asked for.
        return Tiling(32, 64, 16, 4, 2) if target.startswith("sm_10") else Tiling(64, 64, 16, 4, 3)
    if target.startswith("gfx") or not aligned:
        return Tiling(64, 64, 32, 4, 2)
    if target.startswith("sm_9"):
        return Tiling(128, 128, 32, 4, 4)
    return Tiling(128, 128, 32, 8, 3)


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [N, M] = a [N, K] b [K, M] by the vendor's library, summed in float32; `out` may be wider than a and b."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type != "cpu" and torch.version.hip is None:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def project(
    x: Sequence[Tensor], weight: Sequence[Tensor], out: Sequence[Tensor], gate: Tensor | None, tile: Tiling
) -> None:
    """out [T, D_OUT] = x [T, D_IN] weight [D_OUT, D_IN]^T a layer. A closed gate leaves `out` as it is."""
    (tokens, d_in), d_out = x[0].shape, weight[0].shape[0]
    project_kernel[(triton.cdiv(tokens, tile.rows) * triton.cdiv(d_out, tile.columns), len(x))](
        x=tuple(x),
        weight=tuple(weight),
        out=tuple(out),
        gate=gate,
        T=tokens,
        D_OUT=d_out,
        D_IN=d_in,
        s_x=x[0].stride(0),
        s_weight=weight[0].stride(0),
        s_out=out[0].stride(0),
        **_options(len(x), gate, tile),
    )


def state_gradients(
    g: Sequence[Tensor], weight: Sequence[Tensor], out: Sequence[Tensor], gate: Tensor | None, tile: Tiling
) -> None:
    """out [T, D_IN] = g [T, D_OUT] weight [D_OUT, D_IN] a layer, zeros where a gate is closed."""
    (tokens, d_out), d_in = g[0].shape, weight[0].shape[1]
    grid, parts, target = _split(out, tokens, d_in, d_out, tile)
    state_kernel[grid](
        g=tuple(g),
        weight=tuple(weight),
        out=target,
        gate=gate,
        T=tokens,
        D_OUT=d_out,
        D_IN=d_in,
        s_g=g[0].stride(0),
        s_weight=weight[0].stride(0),
        s_out=target[0].stride(0),
        SPLITS=grid[2],
        **_options(len(g), gate, tile),
    )
    _join(parts, out, gate)


def weight_gradients(
    g: Sequence[Tensor],
    x: Sequence[Tensor],
    token_weight: Sequence[Tensor] | None,
    out: Sequence[Tensor],
    gate: Tensor | None,
    tile: Tiling,
) -> None:
    """out [D_OUT, D_IN] = g [T, D_OUT]^T x [T, D_IN] a layer, zeros where a gate is closed.

    Rows of x whose token weighs 0 may hold anything.
    """
    (tokens, d_out), d_in = g[0].shape, x[0].shape[1]
    grid, parts, target = _split(out, d_out, d_in, tokens, tile)
    weight_kernel[grid](
        g=tuple(g),
        x=tuple(x),
        token_weight=None if token_weight is None else tuple(token_weight),
        out=target,
        gate=gate,
        T=tokens,
        D_OUT=d_out,
        D_IN=d_in,
        s_g=g[0].stride(0),
        s_x=x[0].stride(0),
        s_out=target[0].stride(0),
        WEIGHTED=token_weight is not None,
        SPLITS=grid[2],
        **_options(len(g), gate, tile),
    )
    _join(parts, out, gate)


def _options(layers: int, gate: Tensor | None, tile: Tiling) -> dict[str, Any]:
    # The interpreter's products of bfloat16 are wrong.
    return {"LAYERS": layers, "GATED": gate is not None, "WIDEN": INTERPRETED, **tile.options()}


def _split(
    out: Sequence[Tensor], rows: int, columns: int, summed: int, tile: Tiling
) -> tuple[tuple[int, int, int], Tensor | None, tuple[Tensor, ...]]:
    """The grid of a product, memory for its parts [splits, layers, rows, columns] if it is split, and what it fills."""
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    splits = splits_of(tiles * len(out), triton.cdiv(summed, tile.steps))
    if splits == 1:
        return (tiles, len(out), 1), None, tuple(out)
    parts = out[0].new_empty((splits, len(out), rows, columns), dtype=torch.float32)
    return (tiles, len(out), splits), parts, parts[0].unbind()


@cache
def splits_of(tiles: int, steps: int) -> int:
    """In how many parts to take a sum of `steps` steps, so that waves of programs on a large GPU end soonest."""

    def time(splits: int) -> float:
        waves = -(-tiles * splits // RESIDENT)
        joining = LAUNCH_STEPS + JOIN_STEPS * splits * tiles / RESIDENT
        return waves * -(-steps // splits) + (joining if splits > 1 else 0.0)

    return min(range(1, min(MOST_SPLITS, steps) + 1), key=time)


def _join(parts: Tensor | None, out: Sequence[Tensor], gate: Tensor | None) -> None:
    if parts is not None:
        splits, layers = parts.shape[:2]
        size = out[0].numel()
        join_kernel[(triton.cdiv(size, JOINED), layers)](
            parts=parts,
            out=tuple(out),
            gate=gate,
            SIZE=size,
            LAYERS=layers,
            GATED=gate is not None,
            SPLITS=splits,
            BLOCK=JOINED,
        )


@triton.jit
def project_kernel(
    x, weight, out, gate, T, D_OUT, D_IN, s_x, s_weight, s_out,
    LAYERS: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [T, D_OUT] = x [T, D_IN] weight [D_OUT, D_IN]^T. float32 is not rounded to tf32, which would cost three
    digits."""
    i_l = tl.program_id(1)
    if is_closed(gate, i_l, GATED):
        return

    tiles = tl.cdiv(D_OUT, BC)
    o_r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
    o_c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    m_r, m_c = o_r < T, o_c < D_OUT
    p_x, p_weight = of_layer(x, i_l, LAYERS), of_layer(weight, i_l, LAYERS)
    b_y = tl.zeros((BR, BC), tl.float32)
    for i_k in range(0, D_IN, BK):
        o_k = i_k + tl.arange(0, BK)
        b_x = load_tile(p_x, o_r, o_k, s_x, m_r, o_k < D_IN, WIDEN)  # [BR, BK]
        b_weight = load_tile(p_weight, o_c, o_k, s_weight, m_c, o_k < D_IN, WIDEN)  # [BC, BK]
        b_y = tl.dot(b_x, tl.trans(b_weight), b_y, input_precision="ieee")

    store_tile(of_layer(out, i_l, LAYERS), o_r, o_c, s_out, m_r, m_c, b_y)


@triton.jit
def state_kernel(
    g, weight, out, gate, T, D_OUT, D_IN, s_g, s_weight, s_out,
    LAYERS: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out [T, D_IN] = g [T, D_OUT] weight [D_OUT, D_IN]; of SPLITS programs a tile each sums its part of D_OUT."""
    i_l, i_s = tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(D_IN, BC)
    o_r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
    o_c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    m_r, m_c = o_r < T, o_c < D_IN
    p_out = of_layer(out, i_l, LAYERS) + (i_s * LAYERS).to(tl.int64) * T * D_IN
    b_out = tl.zeros((BR, BC), tl.float32)
    if is_closed(gate, i_l, GATED):
        if SPLITS == 1:
            store_tile(p_out, o_r, o_c, s_out, m_r, m_c, b_out)
        return

    p_g, p_weight = of_layer(g, i_l, LAYERS), of_layer(weight, i_l, LAYERS)
    part = tl.cdiv(tl.cdiv(D_OUT, BK), SPLITS) * BK
    end = tl.minimum((i_s + 1) * part, D_OUT)
    for i_k in range(i_s * part, end, BK):
        o_k = i_k + tl.arange(0, BK)
        b_g = load_tile(p_g, o_r, o_k, s_g, m_r, o_k < D_OUT, WIDEN)  # [BR, BK]
        b_weight = load_tile(p_weight, o_k, o_c, s_weight, o_k < D_OUT, m_c, WIDEN)  # [BK, BC]
        b_out = tl.dot(b_g, b_weight, b_out, input_precision="ieee")

    store_tile(p_out, o_r, o_c, s_out, m_r, m_c, b_out)


@triton.jit
def weight_kernel(
    g, x, token_weight, out, gate, T, D_OUT, D_IN, s_g, s_x, s_out,
    LAYERS: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, WIDEN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out [D_OUT, D_IN] = g [T, D_OUT]^T x [T, D_IN]; of SPLITS programs a tile each sums its part of T. Rows of x
    whose token weighs 0 may hold anything."""
    i_l, i_s = tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(D_IN, BC)
    o_r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
    o_c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    m_r, m_c = o_r < D_OUT, o_c < D_IN
    p_out = of_layer(out, i_l, LAYERS) + (i_s * LAYERS).to(tl.int64) * D_OUT * D_IN
    b_out = tl.zeros((BR, BC), tl.float32)
    if is_closed(gate, i_l, GATED):
        if SPLITS == 1:
            store_tile(p_out, o_r, o_c, s_out, m_r, m_c, b_out)
        return

    p_g, p_x = of_layer(g, i_l, LAYERS), of_layer(x, i_l, LAYERS)
    part = tl.cdiv(tl.cdiv(T, BK), SPLITS) * BK
    end = tl.minimum((i_s + 1) * part, T)
    for i_k in range(i_s * part, end, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < T
        b_g = load_tile(p_g, o_k, o_r, s_g, m_k, m_r, WIDEN)  # [BK, BR]
        if WEIGHTED:
            m_k = m_k & (tl.load(of_layer(token_weight, i_l, LAYERS) + o_k, mask=m_k, other=0.0) != 0)
        b_x = load_tile(p_x, o_k, o_c, s_x, m_k, m_c, WIDEN)  # [BK, BC]
        b_out = tl.dot(tl.trans(b_g), b_x, b_out, input_precision="ieee")

    store_tile(p_out, o_r, o_c, s_out, m_r, m_c, b_out)


@triton.jit
def join_kernel(
    parts, out, gate, SIZE, LAYERS: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """out [SIZE] = the sum of parts [SPLITS, LAYERS, SIZE] over the first, in order; zeros if closed."""
    i_l = tl.program_id(1)
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < SIZE
    p_out = of_layer(out, i_l, LAYERS) + o_x
    b_out = tl.zeros((BLOCK,), tl.float32)
    if is_closed(gate, i_l, GATED):
        tl.store(p_out, b_out.to(out[0].dtype.element_ty), mask=m_x)
        return

    for i_s in tl.static_range(SPLITS):
        b_out += tl.load(parts + (i_s * LAYERS + i_l).to(tl.int64) * SIZE + o_x, mask=m_x, other=0.0)
    tl.store(p_out, b_out.to(out[0].dtype.element_ty), mask=m_x)
