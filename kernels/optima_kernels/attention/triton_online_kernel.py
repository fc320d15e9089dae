"""KL between attention maps in one walk over keys: log-sum-exps, the loss and the gradient of q at once.

Where log-sum-exps are not given, `lse_kernel` on each side and then `query_kernel` make each map twice. Here each is
made once, relative to a reference of its row, as softmax is computed online. With base-2 scores S,
e = 2^(S - reference) and Z = sum_j e, a map is P = e / Z, and

    sum_j P_t (log2 P_t - log2 P_s) = sum_j e_t (S_t - reference_t - S_s + reference_s) / Z_t + log2(Z_s / Z_t)
    sum_j (P_s - P_t) k_j = sum_j (e_s - r e_t) k_j / Z_s with r = Z_s / Z_t

r is known when the walk ends. So every tile takes it from the sums so far, its own included, and corrects what was
summed with another r by their difference times sum_j e_t k_j, which is kept for that. Then no product rounds to 16
bits what is large beside the maps' difference, and the gradient is as exact as from P_s - P_t in 16 bits.

The reference is the largest score of the first tile of keys, or 0 where a mask hides it; there is no running maximum.
Where other scores are so far from it that a sum of powers of two is beyond `LARGEST_SUM` or its inverse, the program's
rows begin anew with the largest of all. Two calls of one walk, the second on a branch: a loop around it would take all
registers that there are.

Names are those of `triton_parts`.
"""

import triton
import triton.language as tl

from optima_kernels.attention.triton_parts import (
    LARGEST_SUM,
    SIZES,
    allowed,
    dot,
    edge_scores,
    ends,
    head,
    length_of,
    next_rows,
    rows,
    store_rows,
    sum_within_lanes,
    where_am_i,
)
from optima_kernels.shared.pointers import of_layer

# Below every score, and finite, so that two of them do not differ.
LEAST = tl.constexpr(-1e30)


@triton.jit
def walk(
    b_q_s, b_q_t, k_s, k_t, s_s, s_t, reach, mask, s_mask, i_0, whole, end, N, length,
    scale_s, scale_t,
    D_S: tl.constexpr, D_T: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    GRAD: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr,
    WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Over all keys of rows of queries, whose references are the largest scores of keys before `reach`, or 0. Gives k_s
    and k_t where the walk ended, the references, Z_s and Z_t [BI], the loss's sum within lanes [BI, 4] and the
    gradient's [BI, BD_S]."""
    b_largest_s = tl.full([BI], LEAST, tl.float32)
    b_largest_t = tl.full([BI], LEAST, tl.float32)
    for j_0 in tl.range(0, reach, BJ, num_stages=1):
        b_scores_s = edge_scores(
            b_q_s, k_s, s_s, mask, s_mask, i_0, j_0, N, length, scale_s,
            D_S, BD_S, BI, BJ, CAUSAL, MASK, PER_ELEMENT, LOWEST, WIDEN,
        )  # fmt: skip
        b_largest_s = tl.maximum(b_largest_s, tl.max(b_scores_s, 1))
        b_scores_t = edge_scores(
            b_q_t, k_t, s_t, mask, s_mask, i_0, j_0, N, length, scale_t,
            D_T, BD_T, BI, BJ, CAUSAL, MASK, PER_ELEMENT, LOWEST, WIDEN,
        )  # fmt: skip
        b_largest_t = tl.maximum(b_largest_t, tl.max(b_scores_t, 1))
    b_largest_s = tl.where(b_largest_s > LEAST, b_largest_s, 0.0)
    b_largest_t = tl.where(b_largest_t > LEAST, b_largest_t, 0.0)
    b_z_s = tl.zeros([BI], tl.float32)
    b_z_t = tl.zeros([BI], tl.float32)
    b_ratio = tl.zeros([BI], tl.float32)
    b_total = tl.zeros([BI, 4], tl.float32)
    b_products = tl.zeros([BI, BD_S], tl.float32)
    b_products_t = tl.zeros([BI, BD_S], tl.float32)
    for j_0 in tl.range(0, end, BJ, num_stages=STAGES):
        o_j = j_0 + tl.arange(0, BJ)
        b_k_s = next_rows(k_s, s_s, length - j_0, BJ, D_S, BD_S, WIDEN)  # [BJ, BD_S]
        b_k_t = next_rows(k_t, s_t, length - j_0, BJ, D_T, BD_T, WIDEN)  # [BJ, BD_T]
        b_log_s = dot(b_q_s, tl.trans(b_k_s)) * scale_s - b_largest_s[:, None]  # [BI, BJ]
        b_log_t = dot(b_q_t, tl.trans(b_k_t)) * scale_t - b_largest_t[:, None]
        if j_0 >= whole:
            r_i = tl.arange(0, BI)[:, None]
            m_ij, b_bias = allowed(
                mask, s_mask, i_0, r_i, o_j[None, :], N, length, CAUSAL, MASK, PER_ELEMENT, LOWEST
            )  # fmt: skip
            b_log_s = tl.where(m_ij, b_log_s + b_bias, LEAST)
            b_log_t = tl.where(m_ij, b_log_t + b_bias, LEAST)
        b_e_s, b_e_t = tl.exp2(b_log_s), tl.exp2(b_log_t)
        b_z_s += tl.sum(b_e_s, 1)
        b_z_t += tl.sum(b_e_t, 1)
        b_total += sum_within_lanes(b_e_t * (b_log_t - b_log_s), BI, BJ)
        if GRAD:
            b_next_ratio = b_z_s / tl.maximum(b_z_t, 1.0 / LARGEST_SUM)
            b_products += (b_ratio - b_next_ratio)[:, None] * b_products_t
            b_ratio = b_next_ratio
            b_grad_scores = b_e_s - b_ratio[:, None] * b_e_t
            b_products = tl.dot(b_grad_scores.to(b_k_s.dtype), b_k_s, b_products, input_precision="ieee")
            b_products_t = tl.dot(b_e_t.to(b_k_s.dtype), b_k_s, b_products_t, input_precision="ieee")
        k_s += BJ * s_s
        k_t += BJ * s_t
    return k_s, k_t, b_largest_s, b_largest_t, b_z_s, b_z_t, b_total, b_products


@triton.jit(do_not_specialize=SIZES)
def online_kernel(
    q_s, k_s, q_t, k_t, s_q_s, s_k_s, s_q_t, s_k_t, mask, s_mask, key_lengths, gate, sums_s, sums_t,
    total, grad_q, H, N, M, N_WHOLE, TILES, scale_s, scale_t, grad_scale,
    LAYERS: tl.constexpr, GROUP_S: tl.constexpr, GROUP_T: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, GRAD: tl.constexpr, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, PER_ELEMENT: tl.constexpr, LOWEST: tl.constexpr, GATED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The loss's sum of terms into total [LAYERS, B, H, TILES], and with GRAD grad_q [B, H, N, D_S] a layer and what
    `key_kernel` reads: log-sum-exps to base 2, infinite beyond the queries, sums_s and sums_t [B, H, N_WHOLE] a layer.
    """
    i_l, i_b, i_h, i_lbh, i_0 = where_am_i(H, TILES, BI)
    i_bh = (tl.program_id(0) // TILES).to(tl.int64)  # of the same, in fewer registers
    o_i = i_0 + tl.arange(0, BI)
    m_i = o_i < N
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            tl.store(total + i_lbh * TILES + i_0 // BI, 0.0)
            if GRAD:
                b_nothing = tl.zeros([BI, BD_S], tl.float32)
                store_rows(of_layer(grad_q, i_l, LAYERS), i_bh * N + i_0, m_i, b_nothing, BI, D_S, BD_S)
            return

    length = length_of(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    if MASK != 0:
        mask = head(mask, i_l, i_b, i_h, s_mask, LAYERS)
    q_s = head(q_s, i_l, i_b, i_h, s_q_s, LAYERS)
    k_s = head(k_s, i_l, i_b, i_h // GROUP_S, s_k_s, LAYERS)
    q_t = head(q_t, i_l, i_b, i_h, s_q_t, LAYERS)
    k_t = head(k_t, i_l, i_b, i_h // GROUP_T, s_k_t, LAYERS)
    b_q_s = rows(q_s, i_0, s_q_s[2], m_i, BI, D_S, BD_S, WIDEN, True)  # [BI, BD_S]
    b_q_t = rows(q_t, i_0, s_q_t[2], m_i, BI, D_T, BD_T, WIDEN, True)  # [BI, BD_T]
    whole, end = ends(i_0, N, length, BI, BJ, CAUSAL, MASK)

    reach = tl.minimum(end, BJ)
    if PER_ELEMENT:  # which may hide the first tile from most rows
        reach = end
    k_s, k_t, b_largest_s, b_largest_t, b_z_s, b_z_t, b_total, b_products = walk(
        b_q_s, b_q_t, k_s, k_t, s_k_s[2], s_k_t[2], reach, mask, s_mask, i_0, whole, end, N, length, scale_s, scale_t,
        D_S, D_T, BD_S, BD_T, BI, BJ, GRAD, CAUSAL, MASK, PER_ELEMENT, LOWEST, WIDEN, None,
    )  # fmt: skip
    m_fine = (tl.minimum(b_z_s, b_z_t) > 1.0 / LARGEST_SUM) & (tl.maximum(b_z_s, b_z_t) < LARGEST_SUM)
    if (reach < end) & (tl.max(tl.where(m_fine, 0, 1)) > 0):
        walked = (tl.cdiv(end, BJ) * BJ).to(tl.int64)
        k_s -= walked * s_k_s[2]  # kept, they would cost the first walk registers
        k_t -= walked * s_k_t[2]
        k_s, k_t, b_largest_s, b_largest_t, b_z_s, b_z_t, b_total, b_products = walk(
            b_q_s, b_q_t, k_s, k_t, s_k_s[2], s_k_t[2], end, mask, s_mask, i_0, whole, end, N, length, scale_s, scale_t,
            D_S, D_T, BD_S, BD_T, BI, BJ, GRAD, CAUSAL, MASK, PER_ELEMENT, LOWEST, WIDEN, 1,
        )  # fmt: skip

    m_any = b_z_s > 0
    b_z_s, b_z_t = tl.where(m_any, b_z_s, 1.0), tl.where(m_any, b_z_t, 1.0)
    b_terms = tl.sum(b_total, 1) / b_z_t + tl.log2(b_z_s / b_z_t)
    tl.store(total + i_lbh * TILES + i_0 // BI, tl.sum(tl.where(m_i, b_terms, 0.0)) * 0.6931471805599453)
    if GRAD:
        o_whole = i_bh * N_WHOLE + o_i
        b_lse_s, b_lse_t = b_largest_s + tl.log2(b_z_s), b_largest_t + tl.log2(b_z_t)
        tl.store(of_layer(sums_s, i_l, LAYERS) + o_whole, tl.where(m_i, b_lse_s, float("inf")))
        tl.store(of_layer(sums_t, i_l, LAYERS) + o_whole, tl.where(m_i, b_lse_t, float("inf")))
        b_grad_q = b_products / b_z_s[:, None] * grad_scale
        store_rows(of_layer(grad_q, i_l, LAYERS), i_bh * N + i_0, m_i, b_grad_q, BI, D_S, BD_S)
