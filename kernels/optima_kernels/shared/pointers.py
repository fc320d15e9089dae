"""What kernels share that serve several layers in one launch, and that a gate can stop.

Layers of equal shapes share a launch: kernels take tuples of pointers, and a program selects its layer's. Rows hold
their elements densely.

Names: i_ indices, o_ offsets, m_ masks, b_ tiles, p_ pointers, s_ row strides; B* are tile sizes.
"""

import triton
import triton.language as tl

# A kernel's arguments are at most 4 KiB; a layer takes up to eleven pointers.
MOST_LAYERS_PER_LAUNCH = 32


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
