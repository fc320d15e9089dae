"""The kernels of `hidden_mse` that pass over rows: all of the loss that is not a matrix product.

Names as in `optima_kernels.shared.pointers`: i_ indices, o_ offsets, m_ masks, b_ tiles, p_ pointers, s_ row strides.
"""

import triton
import triton.language as tl

from optima_kernels.shared.pointers import is_closed, load_tile, of_layer, store_tile


@triton.jit
def _normalized(b_x, m_x, D, EPS: tl.constexpr, KIND: tl.constexpr):
    """Normalised rows and the reciprocal of what they were divided by: [BR, BC] and [BR]."""
    if KIND == 1:
        b_x = tl.where(m_x, b_x - (tl.sum(b_x, 1) / D)[:, None], 0.0)
        b_scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + EPS)
    else:
        b_scale = 1.0 / tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), EPS)
    return b_x * b_scale[:, None], b_scale


@triton.jit
def row_kernel(
    x, bias, h_t, token_weight, gate, gradient, loss, sums, T, D, turns, factor, s_x, s_h_t,
    LAYERS: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, KIND: tl.constexpr,
    EPS: tl.constexpr, STORE: tl.constexpr, OWES: tl.constexpr, SUMS: tl.constexpr, DOUBLE: tl.constexpr,
    STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The loss of whole rows x + bias [T, D], its gradient in them, which may lie where x does, and that gradient's
    column sums, both times `factor`: a program takes `turns` times BR rows and leaves its share of loss and sums. OWES:
    zeros if closed."""
    i_l, i_p = tl.program_id(1), tl.program_id(0)
    i_share = i_l * tl.num_programs(0) + i_p
    o_c = tl.arange(0, BC)
    m_c = o_c < D
    p_gradient = of_layer(gradient, i_l, LAYERS)
    p_sums = sums + i_share.to(tl.int64) * D + o_c if SUMS else None
    b_loss = tl.zeros((BR,), tl.float32)
    b_sums = tl.zeros((BR, BC), tl.float32)
    if is_closed(gate, i_l, GATED):
        if OWES:
            for i in range(0, turns):
                o_r = (i_p * turns + i) * BR + tl.arange(0, BR)
                store_tile(p_gradient, o_r, o_c, D, o_r < T, m_c, b_sums)
        return

    p_x, p_h_t = of_layer(x, i_l, LAYERS), of_layer(h_t, i_l, LAYERS)
    if BIASED:
        b_bias = tl.load(of_layer(bias, i_l, LAYERS) + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC]
    for i in tl.range(0, turns, num_stages=STAGES):
        o_r = (i_p * turns + i) * BR + tl.arange(0, BR)
        m_r = o_r < T
        m_counts = m_r
        if WEIGHTED:
            b_counts = tl.load(of_layer(token_weight, i_l, LAYERS) + o_r, mask=m_r, other=0.0)  # [BR]
            m_counts = b_counts != 0
        b_x = load_tile(p_x, o_r, o_c, s_x, m_counts, m_c, True)  # [BR, BC]
        b_t = load_tile(p_h_t, o_r, o_c, s_h_t, m_counts, m_c, True)  # [BR, BC]
        m_x = m_counts[:, None] & m_c[None, :]
        if BIASED:
            b_x += b_bias[None, :]
        if DOUBLE:
            b_x, b_t = b_x.to(tl.float64), b_t.to(tl.float64)
        if KIND != 0:
            b_x, b_scale = _normalized(b_x, m_x, D, EPS, KIND)
            b_t, _ = _normalized(b_t, m_x, D, EPS, KIND)

        b_d = tl.where(m_x, b_x - b_t, 0.0)
        b_squares = tl.sum(b_d * b_d, 1)  # [BR]
        if WEIGHTED:
            b_squares *= b_counts
            b_d *= b_counts[:, None]
        b_loss += b_squares.to(tl.float32)
        if factor is not None:
            b_d *= factor
        if STORE:
            if KIND == 1:
                b_mean, b_along = tl.sum(b_d, 1) / D, tl.sum(b_d * b_x, 1) / D
                b_d = tl.where(m_x, (b_d - b_mean[:, None] - b_x * b_along[:, None]) * b_scale[:, None], 0.0)
            if KIND == 2:
                b_along = tl.where(b_scale < 1.0 / EPS, tl.sum(b_d * b_x, 1), 0.0)
                b_d = tl.where(m_x, (b_d - b_x * b_along[:, None]) * b_scale[:, None], 0.0)
            store_tile(p_gradient, o_r, o_c, D, m_r, m_c, b_d.to(tl.float32))
        if SUMS:
            b_sums += b_d.to(tl.float32)

    tl.store(loss + i_share, tl.sum(b_loss, 0))
    if SUMS:
        tl.store(p_sums, tl.sum(b_sums, 0), mask=m_c)


@triton.jit
def _columns(
    p_x, p_bias, p_h_t, i_c, D, BIASED: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Columns from i_c of a projected row and of the teacher's, zeros beyond D: [BC] each, and where they are."""
    o_c = i_c + tl.arange(0, BC)
    m_c = o_c < D
    b_x = tl.load(p_x + o_c, mask=m_c, other=0.0).to(tl.float32)
    if BIASED:
        b_x += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_x, tl.load(p_h_t + o_c, mask=m_c, other=0.0).to(tl.float32), o_c, m_c


@triton.jit
def _clear(p_row, D, BC: tl.constexpr):
    for i_c in range(0, D, BC):
        o_c = i_c + tl.arange(0, BC)
        tl.store(p_row + o_c, tl.zeros((BC,), tl.float32).to(p_row.dtype.element_ty), mask=o_c < D)


@triton.jit
def wide_row_kernel(
    x, bias, h_t, token_weight, gate, gradient, loss, T, D, factor, s_x, s_h_t,
    LAYERS: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, KIND: tl.constexpr,
    EPS: tl.constexpr, STORE: tl.constexpr, OWES: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`row_kernel` for rows that registers cannot hold: a program walks its row up to four times, from the cache, and
    leaves its loss. Column sums are the caller's."""
    i_l, i_r = tl.program_id(1), tl.program_id(0)
    p_loss = loss + i_l * T + i_r
    p_gradient = of_layer(gradient, i_l, LAYERS) + i_r.to(tl.int64) * D
    if is_closed(gate, i_l, GATED):
        if OWES:
            _clear(p_gradient, D, BC)
        return
    b_count = 1.0
    if WEIGHTED:
        b_count = tl.load(of_layer(token_weight, i_l, LAYERS) + i_r)
        if b_count == 0:
            tl.store(p_loss, 0.0)
            if STORE:
                _clear(p_gradient, D, BC)
            return

    p_x = of_layer(x, i_l, LAYERS) + i_r.to(tl.int64) * s_x
    p_h_t = of_layer(h_t, i_l, LAYERS) + i_r.to(tl.int64) * s_h_t
    p_bias = of_layer(bias, i_l, LAYERS) if BIASED else None
    mean_x, mean_t, scale_x, scale_t = 0.0, 0.0, 1.0, 1.0
    if KIND == 1:
        b_sum_x, b_sum_t = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
        for i_c in range(0, D, BC):
            b_x, b_t, o_c, m_c = _columns(p_x, p_bias, p_h_t, i_c, D, BIASED, BC)
            b_sum_x += b_x
            b_sum_t += b_t
        mean_x, mean_t = tl.sum(b_sum_x, 0) / D, tl.sum(b_sum_t, 0) / D
    if KIND != 0:
        b_sum_x, b_sum_t = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
        for i_c in range(0, D, BC):
            b_x, b_t, o_c, m_c = _columns(p_x, p_bias, p_h_t, i_c, D, BIASED, BC)
            b_x, b_t = tl.where(m_c, b_x - mean_x, 0.0), tl.where(m_c, b_t - mean_t, 0.0)
            b_sum_x += b_x * b_x
            b_sum_t += b_t * b_t
        square_x, square_t = tl.sum(b_sum_x, 0), tl.sum(b_sum_t, 0)
        if KIND == 1:
            scale_x, scale_t = 1.0 / tl.sqrt(square_x / D + EPS), 1.0 / tl.sqrt(square_t / D + EPS)
        else:
            scale_x, scale_t = 1.0 / tl.maximum(tl.sqrt(square_x), EPS), 1.0 / tl.maximum(tl.sqrt(square_t), EPS)

    b_squares, b_sum_d, b_dot = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for i_c in range(0, D, BC):
        b_x, b_t, o_c, m_c = _columns(p_x, p_bias, p_h_t, i_c, D, BIASED, BC)
        b_x = tl.where(m_c, (b_x - mean_x) * scale_x, 0.0)
        b_d = tl.where(m_c, b_x - (b_t - mean_t) * scale_t, 0.0)
        b_squares += b_d * b_d
        b_sum_d += b_d
        b_dot += b_d * b_x
    tl.store(p_loss, tl.sum(b_squares, 0) * b_count)
    if factor is not None:
        b_count *= factor

    if STORE:
        mean, along = 0.0, 0.0
        if KIND == 1:
            mean, along = tl.sum(b_sum_d, 0) / D, tl.sum(b_dot, 0) / D
        if KIND == 2:
            along = tl.where(scale_x < 1.0 / EPS, tl.sum(b_dot, 0), 0.0)
        for i_c in range(0, D, BC):
            b_x, b_t, o_c, m_c = _columns(p_x, p_bias, p_h_t, i_c, D, BIASED, BC)
            b_x = (b_x - mean_x) * scale_x
            b_d = b_x - (b_t - mean_t) * scale_t
            b_d = (b_d - mean - b_x * along) * (scale_x * b_count)
            tl.store(p_gradient + o_c, b_d.to(gradient[0].dtype.element_ty), mask=m_c)


@triton.jit
def join_rows_kernel(
    shares, column_shares, losses, biases, gate, scale, PROGRAMS, D,
    LAYERS: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """losses [L] = scale * the sums of shares [L, PROGRAMS], and biases [D] a layer those of [L, PROGRAMS, D]; zeros if
    closed."""
    i_l, i_c = tl.program_id(1), tl.program_id(0)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < D
    if is_closed(gate, i_l, GATED):
        if i_c == 0:
            tl.store(losses + i_l, 0.0)
        if SUMS:
            tl.store(of_layer(biases, i_l, LAYERS) + o_c, tl.zeros((BC,), tl.float32), mask=m_c)
        return

    if i_c == 0:
        b_loss = tl.zeros((BP * BC,), tl.float32)
        for i_p in range(0, PROGRAMS, BP * BC):
            o_p = i_p + tl.arange(0, BP * BC)
            b_loss += tl.load(shares + i_l * PROGRAMS + o_p, mask=o_p < PROGRAMS, other=0.0)
        tl.store(losses + i_l, tl.sum(b_loss, 0) * scale)

    if SUMS:
        p_shares = column_shares + i_l.to(tl.int64) * PROGRAMS * D
        b_sums = tl.zeros((BP, BC), tl.float32)
        for i_p in tl.range(0, PROGRAMS, BP, num_stages=3):
            o_p = i_p + tl.arange(0, BP)
            b_sums += load_tile(p_shares, o_p, o_c, D, o_p < PROGRAMS, m_c, True)  # [BP, BC]
        tl.store(of_layer(biases, i_l, LAYERS) + o_c, tl.sum(b_sums, 0), mask=m_c)
