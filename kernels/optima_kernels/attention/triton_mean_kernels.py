"""Attention-map kernels for means over heads: per sample one map of quotients is stored, 1 / H of a layer's maps.

The loss looks at the means, so its gradient to every head's map is the same up to a factor 1 / H: that to the mean, G.

- `mean_kernel` owns a tile of queries and keys, walks over the heads of both sides, and leaves the loss and G.
- `mean_query_kernel` owns queries of a head: the row terms r = sum_j P G, and the gradient of q from P (G - r). r is
  known when the walk ends, so every tile takes it from the sum so far, its own share included, and corrects what was
  summed with another r by their difference times sum_j P k_j, as `online_kernel` does.
- `mean_key_kernel` owns keys and walks over the queries of every head that reads them.

A constant added to a row of G changes nothing, r takes it away. So KL's -mean_t / mean_s is stored as
(mean_s - mean_t) / mean_s, which 16 bits hold to their relative precision however near the means are.

A student's mean below `LEAST` counts as `LEAST`: its logarithm, and with it the loss, ends at -83. Log-sum-exps
are those of `triton_kernels`, names those of `triton_parts`.
"""

import triton
import triton.language as tl

from optima_kernels.attention.triton_parts import (
    SIZES,
    allowed,
    allowed_keys,
    dot,
    ends,
    head,
    length_of,
    log_sums,
    next_rows,
    rows,
    where_am_i,
)
from optima_kernels.shared.pointers import of_layer

LEAST = tl.constexpr(2.0**-120)


@triton.jit
def sum_over_heads(
    q, k, s_q, s_k, lse, i_l, i_b, i_0, j_0, m_i, m_j, m_ij, b_bias, N, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    LAYERS: tl.constexpr, WIDEN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Of a tile's maps, 0 where nothing is attended to, which only a tile on an EDGE has to look at: [BI, BJ]."""
    b_sum = tl.zeros([BI, BJ], tl.float32)
    for i_h in range(HEADS):
        head_q, head_k = head(q, i_l, i_b, i_h, s_q, LAYERS), head(k, i_l, i_b, i_h // GROUP, s_k, LAYERS)
        b_q = rows(head_q, i_0, s_q[2], m_i, BI, D, BD, WIDEN, EDGE)  # [BI, BD]
        b_k = rows(head_k, j_0, s_k[2], m_j, BJ, D, BD, WIDEN, EDGE)  # [BJ, BD]
        b_lse = log_sums(of_layer(lse, i_l, LAYERS) + (i_b * HEADS + i_h) * N, i_0, N, BI)
        b_log = dot(b_q, tl.trans(b_k)) * scale - b_lse[:, None]
        if EDGE:
            b_log = tl.where(m_ij, b_log + b_bias, -1e30)
        b_sum += tl.exp2(b_log)
    return b_sum * (1.0 / HEADS)


@triton.jit(do_not_specialize=[*SIZES, "KEY_TILES"])
def mean_kernel(
    q_s, k_s, q_t, k_t, s_q_s, s_k_s, s_q_t, s_k_t, mask, s_mask, key_lengths, gate, lse_s, lse_t,
    quotients, s_quotients, total, N, M, TILES, KEY_TILES, scale_s, scale_t,
    LAYERS: tl.constexpr, HEADS_S: tl.constexpr, HEADS_T: tl.constexpr, GROUP_S: tl.constexpr, GROUP_T: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    MSE: tl.constexpr, GRAD: tl.constexpr, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, MASK: tl.constexpr,
    PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile's sum of terms into total [LAYERS, B, TILES * KEY_TILES], and with GRAD its G into quotients,
    [B, TILES * BI, KEY_TILES * BJ] a layer, 0 where nothing is attended to and beyond queries and keys."""
    i_l = tl.program_id(1)
    i_b = (tl.program_id(0) // (TILES * KEY_TILES)).to(tl.int64)
    i_0, j_0 = tl.program_id(0) // KEY_TILES % TILES * BI, tl.program_id(0) % KEY_TILES * BJ
    p_total = total + i_l.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            tl.store(p_total, 0.0)
            return

    o_i, o_j = i_0 + tl.arange(0, BI), j_0 + tl.arange(0, BJ)
    length = length_of(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    whole, end = ends(i_0, N, length, BI, BJ, CAUSAL, MASK)
    b_g = tl.zeros([BI, BJ], tl.float32)
    b_terms = tl.zeros([BI, BJ], tl.float32)
    if (i_0 < N) & (j_0 < end):
        m_i, m_j = o_i < N, o_j < length
        of_sample = mask
        if MASK != 0:
            of_sample = head(mask, i_l, i_b, 0, s_mask, LAYERS)
        m_ij, b_bias = allowed(
            of_sample, s_mask, i_0, tl.arange(0, BI)[:, None], o_j[None, :], N, length,
            CAUSAL, MASK, PER_ELEMENT, LOWEST,
        )  # fmt: skip
        m_ij = m_ij & m_i[:, None]
        looks = MASK != 0
        if MASK == 0:
            looks = (i_0 + BI > N) | (j_0 + BJ > whole)
        if looks:
            b_mean_s = sum_over_heads(
                q_s, k_s, s_q_s, s_k_s, lse_s, i_l, i_b, i_0, j_0, m_i, m_j, m_ij, b_bias, N, scale_s,
                HEADS_S, GROUP_S, D_S, BD_S, BI, BJ, LAYERS, WIDEN, True,
            )  # fmt: skip
            b_mean_t = sum_over_heads(
                q_t, k_t, s_q_t, s_k_t, lse_t, i_l, i_b, i_0, j_0, m_i, m_j, m_ij, b_bias, N, scale_t,
                HEADS_T, GROUP_T, D_T, BD_T, BI, BJ, LAYERS, WIDEN, True,
            )  # fmt: skip
        else:
            b_mean_s = sum_over_heads(
                q_s, k_s, s_q_s, s_k_s, lse_s, i_l, i_b, i_0, j_0, m_i, m_j, m_ij, b_bias, N, scale_s,
                HEADS_S, GROUP_S, D_S, BD_S, BI, BJ, LAYERS, WIDEN, False,
            )  # fmt: skip
            b_mean_t = sum_over_heads(
                q_t, k_t, s_q_t, s_k_t, lse_t, i_l, i_b, i_0, j_0, m_i, m_j, m_ij, b_bias, N, scale_t,
                HEADS_T, GROUP_T, D_T, BD_T, BI, BJ, LAYERS, WIDEN, False,
            )  # fmt: skip
        b_difference = b_mean_s - b_mean_t
        if MSE:
            b_terms = b_difference * b_difference
            b_g = 2.0 * b_difference
        else:
            b_mean_s = tl.maximum(b_mean_s, LEAST)
            b_terms = b_mean_t * (tl.log2(tl.maximum(b_mean_t, LEAST)) - tl.log2(b_mean_s)) * 0.6931471805599453
            b_g = b_difference / b_mean_s
        b_terms = tl.where(m_ij, b_terms, 0.0)
        b_g = tl.where(m_ij, b_g, 0.0)

    tl.store(p_total, tl.sum(b_terms))
    if GRAD:
        quotients = of_layer(quotients, i_l, LAYERS) + i_b * s_quotients[0] + tl.cast(i_0, tl.int64) * s_quotients[1]
        p_g = quotients + (tl.arange(0, BI)[:, None] * s_quotients[1] + o_j[None, :])
        tl.store(p_g, b_g.to(p_g.dtype.element_ty))


@triton.jit
def quotient_tile(quotients, s_row, i_0, r_i, o_j):
    """G of queries i_0 + r_i and keys o_j, [BI, 1] and [1, BJ] or [1, BI] and [BJ, 1], in float32."""
    return tl.load(quotients + tl.cast(i_0, tl.int64) * s_row + (r_i * s_row + o_j)).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def mean_query_kernel(
    q_s, k_s, s_q_s, s_k_s, mask, s_mask, key_lengths, gate, lse_s, quotients, s_quotients, sums_s, row_term,
    grad_q, H, N, M, N_WHOLE, TILES, scale_s, unit, grad_scale,
    LAYERS: tl.constexpr, GROUP_S: tl.constexpr, D_S: tl.constexpr, BD_S: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, MASK: tl.constexpr,
    PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """grad_q [B, H, N, D_S] a layer, and what `mean_key_kernel` reads: row terms times `unit`, and log-sum-exps to base
    2, infinite beyond the queries, row_term and sums_s [B, H, N_WHOLE] a layer. A score's gradient is rounded times
    `unit`."""
    i_l, i_b, i_h, _, i_0 = where_am_i(H, TILES, BI)
    o_i, o_d = i_0 + tl.arange(0, BI), tl.arange(0, BD_S)
    m_i = o_i < N
    o_rows = (i_b * H + i_h) * N
    grad_q = of_layer(grad_q, i_l, LAYERS) + (o_rows + i_0) * D_S
    p_grad_q = grad_q + tl.arange(0, BI)[:, None] * D_S + o_d[None, :]
    m_grad_q = m_i[:, None] & (o_d < D_S)[None, :]
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            tl.store(p_grad_q, tl.zeros([BI, BD_S], p_grad_q.dtype.element_ty), mask=m_grad_q)
            return

    length = length_of(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    if MASK != 0:
        mask = head(mask, i_l, i_b, 0, s_mask, LAYERS)
    quotients = of_layer(quotients, i_l, LAYERS) + i_b * s_quotients[0]
    k_s = head(k_s, i_l, i_b, i_h // GROUP_S, s_k_s, LAYERS)
    b_q_s = rows(head(q_s, i_l, i_b, i_h, s_q_s, LAYERS), i_0, s_q_s[2], m_i, BI, D_S, BD_S, WIDEN, True)  # [BI, BD_S]
    b_lse_s = log_sums(of_layer(lse_s, i_l, LAYERS) + o_rows, i_0, N, BI)
    o_whole = (i_b * H + i_h) * N_WHOLE + o_i
    tl.store(of_layer(sums_s, i_l, LAYERS) + o_whole, tl.where(m_i, b_lse_s, float("inf")))
    r_i = tl.arange(0, BI)[:, None]
    whole, end = ends(i_0, N, length, BI, BJ, CAUSAL, MASK)

    b_row_term = tl.zeros([BI], tl.float32)
    b_products = tl.zeros([BI, BD_S], tl.float32)
    b_grad_q = tl.zeros([BI, BD_S], tl.float32)
    for j_0 in range(0, end, BJ):
        o_j = j_0 + tl.arange(0, BJ)
        b_k_s = next_rows(k_s, s_k_s[2], length - j_0, BJ, D_S, BD_S, WIDEN)  # [BJ, BD_S]
        b_g = quotient_tile(quotients, s_quotients[1], i_0, r_i, o_j[None, :])
        b_log_s = dot(b_q_s, tl.trans(b_k_s)) * scale_s - b_lse_s[:, None]  # [BI, BJ]
        if j_0 + BJ > whole:
            m_ij, b_bias = allowed(
                mask, s_mask, i_0, r_i, o_j[None, :], N, length, CAUSAL, MASK, PER_ELEMENT, LOWEST
            )  # fmt: skip
            b_log_s = tl.where(m_ij, b_log_s + b_bias, -1e30)
        b_p = tl.exp2(b_log_s)
        b_next_term = b_row_term + tl.sum(b_p * b_g, 1)
        b_grad_q += (b_row_term - b_next_term)[:, None] * b_products
        b_row_term = b_next_term
        b_p = b_p * unit
        b_grad_scores = b_p * (b_g - b_row_term[:, None])
        b_grad_q = tl.dot(b_grad_scores.to(b_k_s.dtype), b_k_s, b_grad_q, input_precision="ieee")
        b_products = tl.dot(b_p.to(b_k_s.dtype), b_k_s, b_products, input_precision="ieee")
        k_s += BJ * s_k_s[2]
    tl.store(of_layer(row_term, i_l, LAYERS) + o_whole, b_row_term * unit)
    tl.store(p_grad_q, (b_grad_q * grad_scale).to(p_grad_q.dtype.element_ty), mask=m_grad_q)


@triton.jit(do_not_specialize=SIZES)
def mean_key_kernel(
    q_s, k_s, s_q_s, s_k_s, mask, s_mask, key_lengths, gate, sums_s, quotients, s_quotients, row_term, grad_k,
    H, N, M, N_WHOLE, TILES, scale_s, unit, grad_scale,
    LAYERS: tl.constexpr, GROUP_S: tl.constexpr, D_S: tl.constexpr, BD_S: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, MASK: tl.constexpr,
    PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """grad_k [B, H / GROUP_S, M, D_S] a layer, from what `mean_query_kernel` left; keys that nobody attends to get
    zeros. Tiles of maps are [BJ, BI]."""
    i_l, i_b, i_h_k, _, j_0 = where_am_i(H // GROUP_S, TILES, BJ)
    o_j, o_d = j_0 + tl.arange(0, BJ), tl.arange(0, BD_S)
    grad_k = of_layer(grad_k, i_l, LAYERS) + ((i_b * (H // GROUP_S) + i_h_k) * M + j_0) * D_S
    p_grad_k = grad_k + tl.arange(0, BJ)[:, None] * D_S + o_d[None, :]
    m_grad_k = (o_j < M)[:, None] & (o_d < D_S)[None, :]
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            tl.store(p_grad_k, tl.zeros([BJ, BD_S], p_grad_k.dtype.element_ty), mask=m_grad_k)
            return

    length = length_of(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    m_j = o_j < length
    if MASK != 0:
        mask = head(mask, i_l, i_b, 0, s_mask, LAYERS)
    quotients = of_layer(quotients, i_l, LAYERS) + i_b * s_quotients[0]
    q_s = of_layer(q_s, i_l, LAYERS) + i_b * s_q_s[0]
    sums_s, row_term = of_layer(sums_s, i_l, LAYERS), of_layer(row_term, i_l, LAYERS)
    k_s = head(k_s, i_l, i_b, i_h_k, s_k_s, LAYERS)
    b_k_s = rows(k_s, j_0, s_k_s[2], m_j, BJ, D_S, BD_S, WIDEN, True)  # [BJ, BD_S]
    end = N
    if LENGTHS:
        end = tl.where(j_0 < length, N, 0)
    start, whole = 0, 0
    if CAUSAL:  # the first query that attends to a key of this tile, and the first from which on all attend to all
        start, whole = j_0 // BI * BI, j_0 + BJ - 1
    b_bias_j = tl.zeros([BJ], tl.float32)
    if MASK != 0 and not PER_ELEMENT:
        m_j, b_bias_j = allowed_keys(mask, s_mask, o_j, N, length, BJ, MASK, LOWEST)

    b_grad_k = tl.zeros([BJ, BD_S], tl.float32)
    for i_g in range(GROUP_S):
        i_h = i_h_k * GROUP_S + i_g
        o_rows = (i_b * H + i_h) * N_WHOLE
        next_q_s = q_s + i_h * s_q_s[1] + tl.cast(start, tl.int64) * s_q_s[2]
        for i_0 in range(start, end, BI):
            o_i = i_0 + tl.arange(0, BI)
            r_i = tl.arange(0, BI)[None, :]
            b_q_s = next_rows(next_q_s, s_q_s[2], N - i_0, BI, D_S, BD_S, WIDEN)  # [BI, BD_S]
            b_g = quotient_tile(quotients, s_quotients[1], i_0, r_i, o_j[:, None])
            b_log_s = dot(b_k_s, tl.trans(b_q_s)) * scale_s - tl.load(sums_s + o_rows + o_i)[None, :]  # [BJ, BI]
            if MASK == 2 and not PER_ELEMENT:
                b_log_s += b_bias_j[:, None]
            looks = PER_ELEMENT
            if CAUSAL and not PER_ELEMENT:
                looks = i_0 < whole
            if looks:
                m_ji, b_bias = allowed(
                    mask, s_mask, i_0, r_i, o_j[:, None], N, length,
                    CAUSAL, MASK if PER_ELEMENT else 0, PER_ELEMENT, LOWEST,
                )  # fmt: skip
                b_log_s = tl.where(m_ji, b_log_s + b_bias, -1e30)
            b_p = tl.exp2(b_log_s)
            b_grad_scores = b_p * (b_g * unit - tl.load(row_term + o_rows + o_i)[None, :])
            b_grad_k = tl.dot(b_grad_scores.to(b_q_s.dtype), b_q_s, b_grad_k, input_precision="ieee")
            next_q_s += BI * s_q_s[2]
    b_grad_k = tl.where(m_j[:, None], b_grad_k * grad_scale, 0.0)
    tl.store(p_grad_k, b_grad_k.to(p_grad_k.dtype.element_ty), mask=m_grad_k)
