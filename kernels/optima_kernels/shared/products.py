"""Matrix products that a gate can stop, for losses that turn a matrix of differences G into gradients.

For `y = x W^T` and G the gradient in y, `state_kernel` makes that of x, G W, and `weight_kernel` those of W and of a
bias, G^T x and the column sums of G. A vendor's product would run whether or not the gate is open, which only the
device knows. Every element is summed by one program in one order, so that the same input gives the same bits.

Layers of equal shapes share a launch: kernels take tuples of pointers, and a program selects its layer's.
Names: i_ indices, o_ offsets, m_ masks, b_ tiles, s_ row strides; B* are tile sizes. Rows hold their elements densely.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


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


def tiling(target: str, narrow: bool) -> Tiling:
    """The tiling of products for "interpreter", "sm_90" or the like; `narrow` says that operands have 16 bits.

    Fixed, not tuned at run time. Chosen from compiled code: no spilled register on any target.
    """
    if target == "interpreter":
        return Tiling(32, 32, 32, 4, 1)
    if not narrow:
        # Of 64 rows Triton 3.7 makes tf32 products on sm_100, in `logits_kernel`, whatever precision is asked for.
        return Tiling(32 if target.startswith("sm_10") else 64, 64, 16, 4, 2)
    if target.startswith("gfx"):
        return Tiling(64, 64, 32, 4, 2)
    return Tiling(128, 128, 32, 8, 3)


@triton.jit
def of_layer(pointers, i_l, LAYERS: tl.constexpr):
    """The pointer of layer i_l."""
    pointer = pointers[0]
    for i in tl.static_range(1, LAYERS):
        pointer = tl.where(i_l == i, pointers[i], pointer)
    return pointer


@triton.jit
def load_tile(base, o_row, o_column, stride, m_row, m_column, WIDEN: tl.constexpr):
    """[rows, columns], zeros where masked."""
    pointers = base + o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
    b_x = tl.load(pointers, mask=m_row[:, None] & m_column[None, :], other=0.0)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def store_tile(base, o_row, o_column, stride, m_row, m_column, b_x):
    pointers = base + o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
    tl.store(pointers, b_x.to(base.dtype.element_ty), mask=m_row[:, None] & m_column[None, :])


@triton.jit
def is_closed(gate, i_l, GATED: tl.constexpr):
    """Whether layer i_l has nothing to do."""
    closed = False
    if GATED:
        closed = tl.load(gate + i_l) == 0
    return closed


@triton.jit
def project_tile(
    x,
    weight,
    o_r,
    o_c,
    m_r,
    m_c,
    D,
    s_x,
    s_weight,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of `x weight^T` in float32: [BR, BC]. float32 is not rounded to tf32, which would cost three digits."""
    b_y = tl.zeros((BR, BC), tl.float32)
    for i_k in range(0, D, BK):
        o_k = i_k + tl.arange(0, BK)
        b_x = load_tile(x, o_r, o_k, s_x, m_r, o_k < D, WIDEN)  # [BR, BK]
        b_weight = load_tile(weight, o_c, o_k, s_weight, m_c, o_k < D, WIDEN)  # [BC, BK]
        b_y = tl.dot(b_x, tl.trans(b_weight).to(b_x.dtype), b_y, input_precision="ieee")
    return b_y


@triton.jit
def state_kernel(
    g, weight, out, gate, T, D_OUT, D_IN, s_g, s_weight, s_out,
    LAYERS: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [T, D_IN] = g [T, D_OUT] weight [D_OUT, D_IN]."""
    i_l = tl.program_id(1)
    tiles = tl.cdiv(D_IN, BC)
    o_r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
    o_c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    m_r, m_c = o_r < T, o_c < D_IN
    p_out = of_layer(out, i_l, LAYERS)
    b_out = tl.zeros((BR, BC), tl.float32)
    if is_closed(gate, i_l, GATED):
        store_tile(p_out, o_r, o_c, s_out, m_r, m_c, b_out)
        return
    p_g, p_weight = of_layer(g, i_l, LAYERS), of_layer(weight, i_l, LAYERS)
    for i_k in range(0, D_OUT, BK):
        o_k = i_k + tl.arange(0, BK)
        b_g = load_tile(p_g, o_r, o_k, s_g, m_r, o_k < D_OUT, WIDEN)  # [BR, BK]
        b_weight = load_tile(p_weight, o_k, o_c, s_weight, o_k < D_OUT, m_c, WIDEN)  # [BK, BC]
        b_out = tl.dot(b_g, b_weight.to(b_g.dtype), b_out, input_precision="ieee")
    store_tile(p_out, o_r, o_c, s_out, m_r, m_c, b_out)


@triton.jit
def weight_kernel(
    g, x, token_weight, out, bias_out, gate, T, D_OUT, D_IN, s_g, s_x, s_out,
    LAYERS: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr, WIDEN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [D_OUT, D_IN] = g [T, D_OUT]^T x [T, D_IN], and bias_out [D_OUT], the column sums of g; both are added to
    what is there when ACCUMULATE. Rows of x whose token weighs 0 may hold anything."""
    i_l = tl.program_id(1)
    tiles = tl.cdiv(D_IN, BC) if WEIGHT else 1
    i_c = tl.program_id(0) % tiles
    o_r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
    o_c = i_c * BC + tl.arange(0, BC)
    m_r, m_c = o_r < D_OUT, o_c < D_IN
    b_out = tl.zeros((BR, BC), tl.float32)
    b_bias = tl.zeros((BR,), tl.float32)
    if is_closed(gate, i_l, GATED):
        if not ACCUMULATE:
            if WEIGHT:
                store_tile(of_layer(out, i_l, LAYERS), o_r, o_c, s_out, m_r, m_c, b_out)
            if BIAS:
                tl.store(of_layer(bias_out, i_l, LAYERS) + o_r, b_bias, mask=m_r & (i_c == 0))
        return
    p_g, p_x = of_layer(g, i_l, LAYERS), of_layer(x, i_l, LAYERS)
    for i_k in range(0, T, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < T
        b_g = load_tile(p_g, o_k, o_r, s_g, m_k, m_r, WIDEN)  # [BK, BR]
        if BIAS:
            b_bias += tl.sum(b_g.to(tl.float32), 0)
        if WEIGHT:
            if WEIGHTED:
                m_k = m_k & (tl.load(of_layer(token_weight, i_l, LAYERS) + o_k, mask=m_k, other=0.0) != 0)
            b_x = load_tile(p_x, o_k, o_c, s_x, m_k, m_c, WIDEN)  # [BK, BC]
            b_out = tl.dot(tl.trans(b_g), b_x.to(b_g.dtype), b_out, input_precision="ieee")
    if WEIGHT:
        p_out = of_layer(out, i_l, LAYERS)
        if ACCUMULATE:
            b_out += load_tile(p_out, o_r, o_c, s_out, m_r, m_c, True)
        store_tile(p_out, o_r, o_c, s_out, m_r, m_c, b_out)
    if BIAS:
        p_bias = of_layer(bias_out, i_l, LAYERS) + o_r
        if ACCUMULATE:
            b_bias += tl.load(p_bias, mask=m_r & (i_c == 0), other=0.0)
        tl.store(p_bias, b_bias, mask=m_r & (i_c == 0))
