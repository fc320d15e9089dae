"""Attention-map loss kernels: a tile of both maps is made, compared and spent inside one program.

Four kernels, none with an atomic, so that the same input gives the same bits:

- `lse_kernel` (rows): log-sum-exp of one side's scores; skipped where the caller hands the rows in, and where
  `triton_online_kernel` makes them on the way.
- `count_kernel` (rows): how many terms a mask leaves, once for all heads that share it.
- `query_kernel` (query-major): the loss, and the gradient of q. A program owns some queries and walks over keys.
- `key_kernel` (key-major): the gradient of k. A program owns some keys and walks over the queries of every head that
  reads them, in order.

KL needs one walk in each direction: its gradient at an element is P_s - P_t. MSE's is P_s (G - r) with
G = 2 (P_s - P_t) and the row term r = sum_j G P_s, so `query_kernel` walks twice: for the loss and r, then for the
gradient. A walk costs two exps per map element, in base 2, with log2(e) folded into the scale.

A walk looks at indices only on the edge: at the end of the keys and on the diagonal of a causal map. `lse_kernel` has a
loop of its own there, the others a branch: two loops around a product that takes its left side from registers are what
ptxas serialises (C7515). Only there does `lse_kernel` look for larger scores, too: within the map its sums are relative
to the largest of the first tile, and the loop of edges takes all tiles where a sum outgrows that. Rows past the end
repeat the last one, so that no load has a mask. In `key_kernel` they are queries, and need no look at all: their
log-sum-exps are infinite, both maps 0. Nor does a rule about keys alone there: it sets whole rows of the gradient to
zero at the end.

`key_kernel` makes its tile transposed, keys by queries, which is how its second product reads it. Transposing the
accumulator of a product for the next one is what compilers for Hopper have been seen to do wrong.

Layers of equal shapes, strides and dtypes share a launch: the kernels take tuples of pointers, and a program selects
its layer's. That needs no copy into a stacked tensor, and no table of pointers on the device, which would have to be
sent there at every step and could not be captured in a CUDA graph. A closed gate is one load and an exit, after the
zeros that are owed.

Names are those of `triton_parts`.
"""

import triton
import triton.language as tl

from optima_kernels.attention.triton_parts import (
    LARGEST_SUM,
    SIZES,
    allowed,
    allowed_keys,
    dot,
    edge_scores,
    ends,
    head,
    length_of,
    log_sums,
    next_rows,
    rows,
    sum_within_lanes,
    where_am_i,
)
from optima_kernels.shared.pointers import of_layer


@triton.jit
def lse_tile(
    b_q, k, s_k, mask, s_mask, i_0, j_0, N, length, scale, b_max, b_sum,
    D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the sums of rows [BI], which are relative to their maxima so far."""
    b_scores = edge_scores(
        b_q, k, s_k, mask, s_mask, i_0, j_0, N, length, scale,
        D, BD, BI, BJ, CAUSAL, MASK, PER_ELEMENT, LOWEST, WIDEN,
    )  # fmt: skip
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
    b_powers = tl.exp2(b_scores - b_new_max[:, None])
    return b_new_max, b_sum * tl.exp2(b_max - b_new_max) + tl.sum(b_powers, 1)


@triton.jit(do_not_specialize=SIZES)
def lse_kernel(
    q, k, s_q, s_k, mask, s_mask, key_lengths, gate, lse, H, N, M, TILES, scale,
    LAYERS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """log sum_j exp(S) of every row, 0 without a key, into lse [LAYERS, B, H, N]. GROUP heads share a key head; the
    scale is at least 0."""
    i_l, i_b, i_h, i_lbh, i_0 = where_am_i(H, TILES, BI)
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            return

    o_i = i_0 + tl.arange(0, BI)
    length = length_of(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    if MASK != 0:
        mask = head(mask, i_l, i_b, i_h, s_mask, LAYERS)
    q = head(q, i_l, i_b, i_h, s_q, LAYERS)
    k = head(k, i_l, i_b, i_h // GROUP, s_k, LAYERS)
    b_q = rows(q, i_0, s_q[2], o_i < N, BI, D, BD, WIDEN, True)  # [BI, BD]

    # Finite, so that a row that has met no key yet gives 2^(-inf - max) = 0 and not NaN.
    b_max = tl.full([BI], -1e30, tl.float32)
    b_sum = tl.zeros([BI], tl.float32)
    whole, end = ends(i_0, N, length, BI, BJ, CAUSAL, MASK)
    # Tiles within the map, if rows leave registers for a loop of them.
    within: tl.constexpr = MASK == 0 and BD * q.dtype.element_ty.primitive_bitwidth <= 2048
    first = end
    if within:
        first = tl.minimum(end, BJ)
    for j_0 in range(0, first, BJ):
        b_max, b_sum = lse_tile(
            b_q, k, s_k[2], mask, s_mask, i_0, j_0, N, length, scale, b_max, b_sum,
            D, BD, BI, BJ, CAUSAL, MASK, PER_ELEMENT, LOWEST, WIDEN,
        )  # fmt: skip
    if within:
        b_powers = tl.zeros([BI, 4], tl.float32)
        next_k = k + BJ * s_k[2]
        for _j_0 in range(BJ, whole, BJ):
            b_k = rows(next_k, 0, s_k[2], None, BJ, D, BD, WIDEN, False)  # [BJ, BD]
            b_powers += sum_within_lanes(tl.exp2(dot(b_q, tl.trans(b_k)) * scale - b_max[:, None]), BI, BJ)
            next_k += BJ * s_k[2]
        b_sum += tl.sum(b_powers, 1)
        again = tl.max(tl.where(b_sum < LARGEST_SUM, 0, 1)) > 0  # of NaN, too
        b_max = tl.where(again, -1e30, b_max)
        b_sum = tl.where(again, 0.0, b_sum)
        for j_0 in range(tl.where(again, 0, tl.maximum(first, whole)), end, BJ):
            b_max, b_sum = lse_tile(
                b_q, k, s_k[2], mask, s_mask, i_0, j_0, N, length, scale, b_max, b_sum,
                D, BD, BI, BJ, CAUSAL, MASK, PER_ELEMENT, LOWEST, WIDEN,
            )  # fmt: skip

    m_any = b_sum > 0
    b_lse = tl.where(m_any, b_max + tl.log2(tl.where(m_any, b_sum, 1.0)), 0.0) * 0.6931471805599453
    tl.store(lse + i_lbh * N + o_i, b_lse, mask=o_i < N)


@triton.jit(do_not_specialize=SIZES)
def count_kernel(
    mask, s_mask, key_lengths, gate, count, H, N, M, TILES,
    LAYERS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, MSE: tl.constexpr, CAUSAL: tl.constexpr,
    LENGTHS: tl.constexpr, MASK: tl.constexpr, PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Elements (MSE), or rows with any, that are attended to in maps of H heads: into count [LAYERS, B, H, TILES]."""
    i_l, i_b, i_h, i_lbh, i_0 = where_am_i(H, TILES, BI)
    p_count = count + i_lbh * TILES + i_0 // BI
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            tl.store(p_count, 0.0)
            return

    length = length_of(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    mask = head(mask, i_l, i_b, i_h, s_mask, LAYERS)
    b_keys = tl.zeros([BI], tl.float32)
    _whole, end = ends(i_0, N, length, BI, BJ, CAUSAL, MASK)
    for j_0 in range(0, end, BJ):
        o_j = j_0 + tl.arange(0, BJ)
        m_ij, _b_bias = allowed(
            mask, s_mask, i_0, tl.arange(0, BI)[:, None], o_j[None, :], N, length,
            CAUSAL, MASK, PER_ELEMENT, LOWEST,
        )  # fmt: skip
        b_keys += tl.sum(tl.broadcast_to(m_ij, BI, BJ).to(tl.float32), 1)
    b_terms = b_keys if MSE else tl.minimum(b_keys, 1.0)
    tl.store(p_count, tl.sum(tl.where(i_0 + tl.arange(0, BI) < N, b_terms, 0.0), 0))


@triton.jit
def score_gradient(b_p_s, b_p_t, b_row_term, MSE: tl.constexpr, GAIN: tl.constexpr):
    """GAIN times the gradient of the sum of terms to the student's natural scores, above float16's underflow."""
    b_gradient = b_p_s * (2.0 * (b_p_s - b_p_t) - b_row_term) if MSE else b_p_s - b_p_t
    if GAIN != 1:
        b_gradient = b_gradient * GAIN
    return b_gradient


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    q_s, k_s, q_t, k_t, s_q_s, s_k_s, s_q_t, s_k_t, mask, s_mask, key_lengths, gate, lse_s, lse_t,
    sums_s, sums_t, row_term, total, grad_q, H, N, M, N_WHOLE, TILES, scale_s, scale_t, grad_scale,
    LAYERS: tl.constexpr, GROUP_S: tl.constexpr, GROUP_T: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, MSE: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr,
    GAIN: tl.constexpr, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, MASK: tl.constexpr, PER_ELEMENT: tl.constexpr,
    LOWEST: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The loss's sum of terms into total [LAYERS, B, H, TILES], and grad_q [B, H, N, D_S] a layer.

    With LOSS it stores sums and, for MSE, the row terms [B, H, N_WHOLE] a layer; with GRAD the gradient, for MSE from
    row terms that were stored before, and what `key_kernel` reads: log-sum-exps to base 2, infinite beyond the queries,
    sums_s and sums_t [B, H, N_WHOLE] a layer.
    """
    i_l, i_b, i_h, i_lbh, i_0 = where_am_i(H, TILES, BI)
    o_i = i_0 + tl.arange(0, BI)
    m_i = o_i < N
    if GRAD:
        o_d = tl.arange(0, BD_S)
        grad_q = of_layer(grad_q, i_l, LAYERS) + ((i_b * H + i_h) * N + i_0) * D_S
        p_grad_q = grad_q + tl.arange(0, BI)[:, None] * D_S + o_d[None, :]
        m_grad_q = m_i[:, None] & (o_d < D_S)[None, :]
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            if LOSS:
                tl.store(total + i_lbh * TILES + i_0 // BI, 0.0)
            if GRAD:
                tl.store(p_grad_q, tl.zeros([BI, BD_S], p_grad_q.dtype.element_ty), mask=m_grad_q)
            return

    length = length_of(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    if MASK != 0:
        mask = head(mask, i_l, i_b, i_h, s_mask, LAYERS)
    q_s = head(q_s, i_l, i_b, i_h, s_q_s, LAYERS)
    k_s = head(k_s, i_l, i_b, i_h // GROUP_S, s_k_s, LAYERS)
    q_t = head(q_t, i_l, i_b, i_h, s_q_t, LAYERS)
    k_t = head(k_t, i_l, i_b, i_h // GROUP_T, s_k_t, LAYERS)
    o_rows = (i_b * H + i_h) * N
    b_q_s = rows(q_s, i_0, s_q_s[2], m_i, BI, D_S, BD_S, WIDEN, True)  # [BI, BD_S]
    b_q_t = rows(q_t, i_0, s_q_t[2], m_i, BI, D_T, BD_T, WIDEN, True)  # [BI, BD_T]
    lse_s, lse_t = of_layer(lse_s, i_l, LAYERS) + o_rows, of_layer(lse_t, i_l, LAYERS) + o_rows
    b_lse_s, b_lse_t = log_sums(lse_s, i_0, N, BI), log_sums(lse_t, i_0, N, BI)
    o_whole = (i_b * H + i_h) * N_WHOLE + o_i
    if GRAD:
        tl.store(of_layer(sums_s, i_l, LAYERS) + o_whole, tl.where(m_i, b_lse_s, float("inf")))
        tl.store(of_layer(sums_t, i_l, LAYERS) + o_whole, tl.where(m_i, b_lse_t, float("inf")))

    b_row_term = tl.zeros([BI], tl.float32)
    if MSE:
        p_row_term = of_layer(row_term, i_l, LAYERS) + o_whole
        if GRAD:
            b_row_term = tl.load(p_row_term)
    b_total = tl.zeros([BI, 4], tl.float32)
    b_row_total = tl.zeros([BI, 4], tl.float32)
    b_grad_q = tl.zeros([BI, BD_S], tl.float32)
    whole, end = ends(i_0, N, length, BI, BJ, CAUSAL, MASK)
    for j_0 in range(0, end, BJ):
        o_j = j_0 + tl.arange(0, BJ)
        b_k_s = next_rows(k_s, s_k_s[2], length - j_0, BJ, D_S, BD_S, WIDEN)  # [BJ, BD_S]
        b_k_t = next_rows(k_t, s_k_t[2], length - j_0, BJ, D_T, BD_T, WIDEN)  # [BJ, BD_T]
        b_log_s = dot(b_q_s, tl.trans(b_k_s)) * scale_s - b_lse_s[:, None]  # [BI, BJ]
        b_log_t = dot(b_q_t, tl.trans(b_k_t)) * scale_t - b_lse_t[:, None]
        if j_0 >= whole:
            r_i = tl.arange(0, BI)[:, None]
            m_ij, b_bias = allowed(
                mask, s_mask, i_0, r_i, o_j[None, :], N, length, CAUSAL, MASK, PER_ELEMENT, LOWEST
            )  # fmt: skip
            # Finite, so that both maps are 0 and their logarithms do not differ.
            b_log_s = tl.where(m_ij, b_log_s + b_bias, -1e30)
            b_log_t = tl.where(m_ij, b_log_t + b_bias, -1e30)
        b_p_s, b_p_t = tl.exp2(b_log_s), tl.exp2(b_log_t)
        if LOSS:
            if MSE:
                b_difference = b_p_s - b_p_t
                b_total += sum_within_lanes(b_difference * b_difference, BI, BJ)
                b_row_total += sum_within_lanes(b_difference * b_p_s, BI, BJ)
            else:
                b_total += sum_within_lanes(b_p_t * (b_log_t - b_log_s), BI, BJ)
        if GRAD:
            b_grad_scores = score_gradient(b_p_s, b_p_t, b_row_term[:, None], MSE, GAIN)
            b_grad_q = tl.dot(b_grad_scores.to(b_k_s.dtype), b_k_s, b_grad_q, input_precision="ieee")
        k_s += BJ * s_k_s[2]
        k_t += BJ * s_k_t[2]

    if LOSS:
        unit = 1.0 if MSE else 0.6931471805599453
        tl.store(total + i_lbh * TILES + i_0 // BI, tl.sum(tl.where(m_i[:, None], b_total, 0.0)) * unit)
        if MSE:
            tl.store(p_row_term, 2.0 * tl.sum(b_row_total, 1))
    if GRAD:
        tl.store(p_grad_q, (b_grad_q * grad_scale).to(p_grad_q.dtype.element_ty), mask=m_grad_q)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    q_s, k_s, q_t, k_t, s_q_s, s_k_s, s_q_t, s_k_t, mask, s_mask, key_lengths, gate, sums_s, sums_t,
    row_term, grad_k, H, N, M, N_WHOLE, TILES, scale_s, scale_t, grad_scale,
    LAYERS: tl.constexpr, GROUP_S: tl.constexpr, GROUP_T: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, MSE: tl.constexpr, GAIN: tl.constexpr,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, MASK: tl.constexpr, PER_ELEMENT: tl.constexpr,
    LOWEST: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """grad_k [B, H / GROUP_S, M, D_S] a layer, contiguous, from what `query_kernel` left in sums_s, sums_t and row_term
    [B, H, N_WHOLE]; keys that nobody attends to get zeros."""
    i_l, i_b, i_h_k, _, j_0 = where_am_i(H // GROUP_S, TILES, BJ)
    o_j = j_0 + tl.arange(0, BJ)
    o_d = tl.arange(0, BD_S)
    grad_k = of_layer(grad_k, i_l, LAYERS) + ((i_b * (H // GROUP_S) + i_h_k) * M + j_0) * D_S
    p_grad_k = grad_k + tl.arange(0, BJ)[:, None] * D_S + o_d[None, :]
    m_grad_k = (o_j < M)[:, None] & (o_d < D_S)[None, :]
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            tl.store(p_grad_k, tl.zeros([BJ, BD_S], p_grad_k.dtype.element_ty), mask=m_grad_k)
            return

    length = length_of(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    m_j = o_j < length
    q_s = of_layer(q_s, i_l, LAYERS) + i_b * s_q_s[0]
    q_t = of_layer(q_t, i_l, LAYERS) + i_b * s_q_t[0]
    k_t = of_layer(k_t, i_l, LAYERS) + i_b * s_k_t[0]
    sums_s, sums_t = of_layer(sums_s, i_l, LAYERS), of_layer(sums_t, i_l, LAYERS)
    if MSE:
        row_term = of_layer(row_term, i_l, LAYERS)
    end = N
    if LENGTHS:
        end = tl.where(j_0 < length, N, 0)
    start, whole = 0, 0
    if CAUSAL:  # the first query that attends to a key of this tile, and the first that attends to all
        start, whole = j_0 // BI * BI, j_0 + BJ - 1
    if MASK != 0:
        mask = of_layer(mask, i_l, LAYERS) + i_b * s_mask[0]
    b_bias_j = tl.zeros([BJ], tl.float32)
    if MASK != 0 and not PER_ELEMENT:
        m_j, b_bias_j = allowed_keys(mask, s_mask, o_j, N, length, BJ, MASK, LOWEST)
    b_k_s = rows(
        head(k_s, i_l, i_b, i_h_k, s_k_s, LAYERS), j_0, s_k_s[2], m_j, BJ, D_S, BD_S, WIDEN, True
    )  # [BJ, BD_S]

    b_grad_k = tl.zeros([BJ, BD_S], tl.float32)
    for i_g in range(GROUP_S):
        i_h = i_h_k * GROUP_S + i_g
        o_rows = (i_b * H + i_h) * N_WHOLE
        b_k_t = rows(
            k_t + (i_h // GROUP_T) * s_k_t[1], j_0, s_k_t[2], o_j < length, BJ, D_T, BD_T, WIDEN, True
        )  # [BJ, BD_T]
        next_q_s = q_s + i_h * s_q_s[1] + tl.cast(start, tl.int64) * s_q_s[2]
        next_q_t = q_t + i_h * s_q_t[1] + tl.cast(start, tl.int64) * s_q_t[2]
        head_mask = mask
        if MASK != 0 and PER_ELEMENT:
            head_mask = mask + i_h * s_mask[1]
        head_row_term = row_term
        if MSE:
            head_row_term = row_term + o_rows
        for i_0 in range(start, end, BI):
            o_i = i_0 + tl.arange(0, BI)
            b_q_s = next_rows(next_q_s, s_q_s[2], N - i_0, BI, D_S, BD_S, WIDEN)  # [BI, BD_S]
            b_q_t = next_rows(next_q_t, s_q_t[2], N - i_0, BI, D_T, BD_T, WIDEN)  # [BI, BD_T]
            b_log_s = dot(b_k_s, tl.trans(b_q_s)) * scale_s - tl.load(sums_s + o_rows + o_i)[None, :]  # [BJ, BI]
            b_log_t = dot(b_k_t, tl.trans(b_q_t)) * scale_t - tl.load(sums_t + o_rows + o_i)[None, :]
            if MASK == 2 and not PER_ELEMENT:
                b_log_s += b_bias_j[:, None]
                b_log_t += b_bias_j[:, None]
            looks = PER_ELEMENT
            if CAUSAL and not PER_ELEMENT:
                looks = i_0 < whole
            if looks:
                r_i = tl.arange(0, BI)[None, :]
                m_ji, b_bias = allowed(
                    head_mask, s_mask, i_0, r_i, o_j[:, None], N, length,
                    CAUSAL, MASK if PER_ELEMENT else 0, PER_ELEMENT, LOWEST,
                )  # fmt: skip
                b_log_s = tl.where(m_ji, b_log_s + b_bias, -1e30)
                b_log_t = tl.where(m_ji, b_log_t + b_bias, -1e30)
            b_row_term = tl.zeros([BI], tl.float32)
            if MSE:
                b_row_term = tl.load(head_row_term + o_i)
            b_grad_scores = score_gradient(tl.exp2(b_log_s), tl.exp2(b_log_t), b_row_term[None, :], MSE, GAIN)
            b_grad_k = tl.dot(b_grad_scores.to(b_q_s.dtype), b_q_s, b_grad_k, input_precision="ieee")
            next_q_s += BI * s_q_s[2]
            next_q_t += BI * s_q_t[2]

    b_grad_k = tl.where(m_j[:, None], b_grad_k * grad_scale, 0.0)
    tl.store(p_grad_k, b_grad_k.to(p_grad_k.dtype.element_ty), mask=m_grad_k)
