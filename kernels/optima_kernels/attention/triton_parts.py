"""What the attention-map kernels share: where rows lie in memory, and who attends to whom.

Names: i_ indices, o_ offsets, b_ tiles, m_ masks, s_ strides; B* are tile sizes. H counts query heads; GROUP_S and
GROUP_T of them share a key head of the student and of the teacher.
"""

import triton
import triton.language as tl

from optima_kernels.shared.pointers import of_layer

# No variant for a size of 1 or a multiple of 16: more variants compile, and one key breaks the compiler on sm_100.
SIZES = ["H", "N", "M", "TILES", "N_WHOLE"]

# Of a row's powers of two; there is room for its square in float32.
LARGEST_SUM = tl.constexpr(2.0**60)


@triton.jit
def head(pointers, i_l, i_b, i_h, strides, LAYERS: tl.constexpr):
    """Where head i_h of sample i_b of layer i_l begins."""
    return of_layer(pointers, i_l, LAYERS) + i_b * strides[0] + i_h * strides[1]


@triton.jit
def load_rows(pointers, m_row, D: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr, MASKED: tl.constexpr):
    """What lies there, [BR, BD]: zeros beyond D columns and, if MASKED, in rows where m_row is not."""
    m_d = (tl.arange(0, BD) < D)[None, :]
    if MASKED:
        b_x = tl.load(pointers, mask=m_row[:, None] & m_d if D < BD else m_row[:, None], other=0.0)
    elif D < BD:
        b_x = tl.load(pointers, mask=m_d, other=0.0)
    else:
        b_x = tl.load(pointers)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def rows(
    base, i_0, s_row, m_row, BR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """BR rows of D elements each from row i_0 on, with zeros where m_row is not, if MASKED: [BR, BD]."""
    o_d = tl.arange(0, BD)
    # 32-bit offsets from a 64-bit row, which do not change in a loop.
    pointers = base + tl.cast(i_0, tl.int64) * s_row + (tl.arange(0, BR)[:, None] * s_row + o_d[None, :])
    return load_rows(pointers, m_row, D, BD, WIDEN, MASKED)


@triton.jit
def next_rows(base, s_row, left, BR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr):
    """BR rows of D elements each from `base` on, of which `left` are there; the others hold finite numbers: [BR, BD].

    For a loop that moves its base on, so that no row's number meets a 64-bit stride. Rows that are not there repeat the
    last one: without a mask, a load is a tenth of what such a loop executes cheaper. But pointers that do not follow
    from one another take registers, and where rows are wide none are left: then those rows are zeros.
    """
    o_d = tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    repeats: tl.constexpr = BD * base.dtype.element_ty.primitive_bitwidth <= 2048
    if repeats:
        o_r = tl.minimum(o_r, left - 1)
    pointers = base + (o_r[:, None] * tl.cast(s_row, tl.int32) + o_d[None, :])
    return load_rows(pointers, o_r < left, D, BD, WIDEN, not repeats)


@triton.jit
def store_rows(base, i_0, m_row, b_x, BR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """b_x [BR, BD] to rows of D elements that lie one after the other, from row i_0 on, where m_row is."""
    o_d = tl.arange(0, BD)
    pointers = base + i_0 * D + (tl.arange(0, BR)[:, None] * D + o_d[None, :])
    tl.store(pointers, b_x.to(base.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def sum_within_lanes(b_x, BI: tl.constexpr, BJ: tl.constexpr):
    """Rows summed as far as a lane has their elements where a product left them: [BI, BJ] to [BI, 4].

    A lane has two neighbours of every eight columns. What is left waits for the end of a walk, and with it the lanes
    for one another.
    """
    b_of_pairs = tl.sum(tl.reshape(b_x, [BI, BJ // 8, 8]), 1)
    return tl.sum(tl.reshape(b_of_pairs, [BI, 4, 2]), 2)


@triton.jit
def log_sums(lse, i_0, N, BI: tl.constexpr):
    """Base-2 log-sum-exps of rows, from natural ones: [BI]."""
    o_i = i_0 + tl.arange(0, BI)
    return tl.load(lse + o_i, mask=o_i < N, other=0.0) * 1.4426950408889634


@triton.jit
def dot(b_x, b_y):
    """The product in float32; float32 operands are not rounded to tf32, which would cost three digits."""
    return tl.dot(b_x, b_y, input_precision="ieee")


@triton.jit
def allowed(
    mask, s_mask, i_0, r_i, o_j, N, length,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Which element of a tile is attended to, and what an additive mask adds to its base-2 score.

    r_i counts queries from i_0; r_i and o_j are [BI, 1] and [1, BJ], or [1, BI] and [BJ, 1]. Both results broadcast to
    the tile.
    """
    m_ij = o_j < length
    if CAUSAL:
        m_ij = m_ij & (o_j <= i_0 + r_i)
    b_bias = 0.0
    if MASK != 0:
        if PER_ELEMENT:
            # 32-bit offsets from a 64-bit row: 64-bit ones for every element were measured to spill.
            pointers = mask + tl.cast(i_0, tl.int64) * s_mask[2] + (r_i * s_mask[2] + o_j * s_mask[3])
            b_mask = tl.load(pointers, mask=m_ij & (i_0 + r_i < N), other=0)
        else:
            b_mask = tl.load(mask + o_j * s_mask[3], mask=o_j < length, other=0)
        if MASK == 1:
            m_ij = m_ij & (b_mask != 0)
        else:
            b_mask = b_mask.to(tl.float32)
            m_ij = m_ij & (b_mask > LOWEST)
            b_bias = tl.where(b_mask > LOWEST, b_mask, 0.0) * 1.4426950408889634
    return m_ij, b_bias


@triton.jit
def edge_scores(
    b_q, k, s_k, mask, s_mask, i_0, j_0, N, length, scale,
    D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Base-2 scores of a tile that may lie on the edge, -inf where nothing is attended to: [BI, BJ]."""
    o_j = j_0 + tl.arange(0, BJ)
    b_k = rows(k, j_0, s_k, o_j < length, BJ, D, BD, WIDEN, True)  # [BJ, BD]
    m_ij, b_bias = allowed(
        mask, s_mask, i_0, tl.arange(0, BI)[:, None], o_j[None, :], N, length, CAUSAL, MASK, PER_ELEMENT, LOWEST
    )  # fmt: skip
    return tl.where(m_ij, dot(b_q, tl.trans(b_k)) * scale + b_bias, -float("inf"))


@triton.jit
def allowed_keys(mask, s_mask, o_j, N, length, BJ: tl.constexpr, MASK: tl.constexpr, LOWEST: tl.constexpr):
    """The same of keys o_j, where a mask knows nothing of queries: both [BJ]."""
    m_j, b_bias = allowed(
        mask, s_mask, 0, tl.arange(0, 1)[None, :], o_j[:, None], N, length, False, MASK, False, LOWEST
    )
    m_j = tl.reshape(m_j, [BJ])
    b_bias_j = tl.zeros([BJ], tl.float32)
    if MASK == 2:
        b_bias_j = tl.reshape(b_bias, [BJ])
    return m_j, b_bias_j


@triton.jit
def length_of(key_lengths, i_l, i_b, M, LAYERS: tl.constexpr, LENGTHS: tl.constexpr):
    """How many keys sample i_b has."""
    length = M
    if LENGTHS:
        length = tl.minimum(tl.load(of_layer(key_lengths, i_l, LAYERS) + i_b).to(tl.int32), M)
    return length


@triton.jit
def where_am_i(H, TILES, BR: tl.constexpr):
    """Layer, sample, one of H heads, all three in one index, and the first row of this program.

    Neighbouring programs share a head, and so the tensors they walk over in L2.
    """
    i_l = tl.program_id(1)
    i_bh = tl.program_id(0) // TILES
    i_lbh = (i_l * (tl.num_programs(0) // TILES) + i_bh).to(tl.int64)
    return i_l, (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), i_lbh, (tl.program_id(0) % TILES) * BR


@triton.jit
def ends(i_0, N, length, BI: tl.constexpr, BJ: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """Up to which key there are tiles of BJ that every query of a tile attends to whole, and up to which any of them
    attends to one.

    With a mask nothing is sure. That is said by a number that the compiler cannot know to be below every other: a
    branch that may be taken keeps ptxas from waiting for each product where it is issued (C7515).
    """
    whole, end = length, length
    if CAUSAL:
        whole, end = tl.minimum(length, i_0 + 1), tl.minimum(length, i_0 + BI)
    whole = whole // BJ * BJ
    if MASK != 0:
        whole = -N
    return whole, end
