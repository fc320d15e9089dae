"""Attention-map loss kernels: a tile of both maps is made, compared and spent inside one program.

Three kernels, none with an atomic, so that the same input gives the same bits:

- `lse_kernel` (rows): base-2 log-sum-exp of one side's scores; skipped where the caller hands the rows in.
- `query_kernel` (query-major): the loss, and the gradient of q. A program owns some queries and walks over keys.
- `key_kernel` (key-major): the gradient of k. A program owns some keys and walks over queries.

KL needs one walk in each direction: its gradient at an element is P_s - P_t. MSE's is P_s (G - r) with
G = 2 (P_s - P_t) and the row term r = sum_j G P_s, so `query_kernel` walks twice: for the loss and r, then for the
gradient. A walk costs two exps per map element, in base 2, with log2(e) folded into the scale.

Layers of equal shapes, strides and dtypes share a launch: the kernels take tuples of pointers, and a program selects
its layer's. That needs no copy into a stacked tensor, and no table of pointers on the device, which would have to be
sent there at every step and could not be captured in a CUDA graph. A closed gate is one load and an exit, after the
zeros that are owed.

Names: i_ indices, o_ offsets, b_ tiles, m_ masks, s_ strides; B* are tile sizes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optima_kernels.attention import blocked
from optima_kernels.attention.problem import MapLayer, MapOptions, MapSums, empty_gradients
from optima_kernels.shared.dispatch import INTERPRETED
from optima_kernels.shared.target import target_of

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# A kernel's arguments are at most 4 KiB; a layer takes up to nine pointers.
MOST_LAYERS_PER_LAUNCH = 32
NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2


@triton.jit
def _of_layer(pointers, i_l, LAYERS: tl.constexpr):
    """The pointer of layer i_l."""
    pointer = pointers[0]
    for i in tl.static_range(1, LAYERS):
        pointer = tl.where(i_l == i, pointers[i], pointer)
    return pointer


@triton.jit
def _head(pointers, i_l, i_b, i_h, strides, LAYERS: tl.constexpr):
    """Where head i_h of sample i_b of layer i_l begins."""
    return _of_layer(pointers, i_l, LAYERS) + i_b * strides[0] + i_h * strides[1]


@triton.jit
def _rows(base, o_row, s_row, m_row, D: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr):
    """Rows `o_row` of D elements each, zeros where masked: [rows, BD]."""
    o_d = tl.arange(0, BD)
    pointers = base + o_row.to(tl.int64)[:, None] * s_row + o_d[None, :]
    b_x = tl.load(pointers, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def _dot(b_x, b_y):
    """The product in float32; float32 operands are not rounded to tf32, which would cost three digits."""
    return tl.dot(b_x, b_y, input_precision="ieee")


@triton.jit
def _attends(
    mask, s_mask, i_0, o_i, o_j, m_i, m_j, length, CAUSAL: tl.constexpr, MASK: tl.constexpr, LOWEST: tl.constexpr
):
    """Which element of a tile is attended to, and what an additive mask adds to its base-2 score: [BI, BJ] both."""
    m_ij = m_i[:, None] & (m_j & (o_j < length))[None, :]
    b_bias = tl.zeros(m_ij.shape, tl.float32)
    if CAUSAL:
        m_ij = m_ij & (o_j[None, :] <= o_i[:, None])
    if MASK != 0:
        # 32-bit offsets from a 64-bit row: 64-bit ones for every element were measured to spill.
        o_mask = (o_i - i_0)[:, None] * s_mask[2] + o_j[None, :] * s_mask[3]
        b_mask = tl.load(mask + tl.cast(i_0, tl.int64) * s_mask[2] + o_mask, mask=m_ij, other=0)
        if MASK == 1:
            m_ij = m_ij & (b_mask != 0)
        else:
            b_mask = b_mask.to(tl.float32)
            m_ij = m_ij & (b_mask > LOWEST)
            b_bias = tl.where(m_ij, b_mask, 0.0) * 1.4426950408889634
    return m_ij, b_bias


@triton.jit
def _length(key_lengths, i_l, i_b, M, LAYERS: tl.constexpr, LENGTHS: tl.constexpr):
    """How many keys sample i_b has."""
    length = M
    if LENGTHS:
        length = tl.minimum(tl.load(_of_layer(key_lengths, i_l, LAYERS) + i_b).to(tl.int32), M)
    return length


@triton.jit
def _where_am_i(H, TILES, BR: tl.constexpr):
    """Layer, sample, head, all three in one index, and the first row of this program.

    Neighbouring programs share a head, and so the tensors they walk over in L2.
    """
    i_l = tl.program_id(1)
    i_bh = tl.program_id(0) // TILES
    i_lbh = (i_l * (tl.num_programs(0) // TILES) + i_bh).to(tl.int64)
    return i_l, (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), i_lbh, (tl.program_id(0) % TILES) * BR


@triton.jit
def _maps(b_q_s, b_k_s, b_q_t, b_k_t, b_lse_s, b_lse_t, scale_s, scale_t, m_ij, b_bias):
    """P_s, P_t and log2(P_t / P_s) of a tile, all 0 where nothing is attended to: [BI, BJ] each."""
    b_log_s = _dot(b_q_s, tl.trans(b_k_s)) * scale_s + b_bias - b_lse_s[:, None]
    b_log_t = _dot(b_q_t, tl.trans(b_k_t)) * scale_t + b_bias - b_lse_t[:, None]
    b_p_s = tl.where(m_ij, tl.exp2(b_log_s), 0.0)
    b_p_t = tl.where(m_ij, tl.exp2(b_log_t), 0.0)
    return b_p_s, b_p_t, tl.where(m_ij, b_log_t - b_log_s, 0.0)


@triton.jit
def _score_gradient(b_p_s, b_p_t, b_row_term, MSE: tl.constexpr):
    """The gradient of the sum of terms to the student's natural scores: [BI, BJ]."""
    if MSE:
        return b_p_s * (2.0 * (b_p_s - b_p_t) - b_row_term[:, None])
    return b_p_s - b_p_t


@triton.jit
def lse_kernel(
    q,
    k,
    s_q,
    s_k,
    mask,
    s_mask,
    key_lengths,
    gate,
    lse,
    H,
    N,
    M,
    TILES,
    scale,
    LAYERS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    CAUSAL: tl.constexpr,
    LENGTHS: tl.constexpr,
    MASK: tl.constexpr,
    LOWEST: tl.constexpr,
    GATED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """log2 sum_j 2^S of every row, 0 where it has no key, into lse [LAYERS, B, H, N]."""
    i_l, i_b, i_h, i_lbh, i_0 = _where_am_i(H, TILES, BI)
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            return
    o_i = i_0 + tl.arange(0, BI)
    m_i = o_i < N
    length = _length(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    if MASK != 0:
        mask = _head(mask, i_l, i_b, i_h, s_mask, LAYERS)
    q = _head(q, i_l, i_b, i_h, s_q, LAYERS)
    k = _head(k, i_l, i_b, i_h, s_k, LAYERS)
    b_q = _rows(q, o_i, s_q[2], m_i, D, BD, WIDEN)
    # Finite, so that a row that has met no key yet gives 2^(-inf - max) = 0 and not NaN.
    b_max = tl.full([BI], -1e30, tl.float32)
    b_sum = tl.zeros([BI], tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, i_0 + BI)
    for j_0 in range(0, end, BJ):
        o_j = j_0 + tl.arange(0, BJ)
        b_k = _rows(k, o_j, s_k[2], o_j < M, D, BD, WIDEN)
        m_ij, b_bias = _attends(mask, s_mask, i_0, o_i, o_j, m_i, o_j < M, length, CAUSAL, MASK, LOWEST)
        b_scores = tl.where(m_ij, _dot(b_q, tl.trans(b_k)) * scale + b_bias, -float("inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new_max) + tl.sum(tl.exp2(b_scores - b_new_max[:, None]), 1)
        b_max = b_new_max
    m_any = b_sum > 0
    b_lse = tl.where(m_any, b_max, 0.0) + tl.log2(tl.where(m_any, b_sum, 1.0))
    tl.store(lse + i_lbh * N + o_i, b_lse, mask=m_i)


@triton.jit
def query_kernel(
    q_s,
    k_s,
    q_t,
    k_t,
    s_q_s,
    s_k_s,
    s_q_t,
    s_k_t,
    mask,
    s_mask,
    key_lengths,
    gate,
    lse_s,
    lse_t,
    row_term,
    total,
    count,
    grad_q,
    H,
    N,
    M,
    TILES,
    scale_s,
    scale_t,
    grad_scale,
    LAYERS: tl.constexpr,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    BD_S: tl.constexpr,
    BD_T: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    MSE: tl.constexpr,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    LENGTHS: tl.constexpr,
    MASK: tl.constexpr,
    LOWEST: tl.constexpr,
    GATED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """LOSS: total and count of terms [LAYERS, B, H, TILES], and MSE's row_term [LAYERS, B, H, N].

    GRAD: grad_q [B, H, N, D_S] a layer, contiguous float32; MSE then reads row_term.
    """
    i_l, i_b, i_h, i_lbh, i_0 = _where_am_i(H, TILES, BI)
    o_i = i_0 + tl.arange(0, BI)
    m_i = o_i < N
    if GRAD:
        o_d = tl.arange(0, BD_S)
        grad_q = _of_layer(grad_q, i_l, LAYERS) + ((i_b * H + i_h) * N + i_0) * D_S
        p_grad_q = grad_q + tl.arange(0, BI)[:, None] * D_S + o_d[None, :]
        m_grad_q = m_i[:, None] & (o_d < D_S)[None, :]
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            if LOSS:
                tl.store(total + i_lbh * TILES + i_0 // BI, 0.0)
                tl.store(count + i_lbh * TILES + i_0 // BI, 0.0)
            if GRAD:
                tl.store(p_grad_q, tl.zeros([BI, BD_S], tl.float32), mask=m_grad_q)
            return
    length = _length(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    if MASK != 0:
        mask = _head(mask, i_l, i_b, i_h, s_mask, LAYERS)
    q_s = _head(q_s, i_l, i_b, i_h, s_q_s, LAYERS)
    k_s = _head(k_s, i_l, i_b, i_h, s_k_s, LAYERS)
    q_t = _head(q_t, i_l, i_b, i_h, s_q_t, LAYERS)
    k_t = _head(k_t, i_l, i_b, i_h, s_k_t, LAYERS)
    b_q_s = _rows(q_s, o_i, s_q_s[2], m_i, D_S, BD_S, WIDEN)
    b_q_t = _rows(q_t, o_i, s_q_t[2], m_i, D_T, BD_T, WIDEN)
    b_lse_s = tl.load(lse_s + i_lbh * N + o_i, mask=m_i, other=0.0)
    b_lse_t = tl.load(lse_t + i_lbh * N + o_i, mask=m_i, other=0.0)
    b_row_term = tl.zeros([BI], tl.float32)
    if MSE and GRAD:
        b_row_term = tl.load(row_term + i_lbh * N + o_i, mask=m_i, other=0.0)
    b_total = tl.zeros([BI], tl.float32)
    b_keys = tl.zeros([BI], tl.float32)
    b_grad_q = tl.zeros([BI, BD_S], tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, i_0 + BI)
    for j_0 in range(0, end, BJ):
        o_j = j_0 + tl.arange(0, BJ)
        m_j = o_j < M
        b_k_s = _rows(k_s, o_j, s_k_s[2], m_j, D_S, BD_S, WIDEN)
        b_k_t = _rows(k_t, o_j, s_k_t[2], m_j, D_T, BD_T, WIDEN)
        m_ij, b_bias = _attends(mask, s_mask, i_0, o_i, o_j, m_i, m_j, length, CAUSAL, MASK, LOWEST)
        b_p_s, b_p_t, b_ratio = _maps(b_q_s, b_k_s, b_q_t, b_k_t, b_lse_s, b_lse_t, scale_s, scale_t, m_ij, b_bias)
        if LOSS:
            if CAUSAL or LENGTHS or MASK != 0:
                b_keys += tl.sum(m_ij.to(tl.float32), 1)
            if MSE:
                b_difference = b_p_s - b_p_t
                b_total += tl.sum(b_difference * b_difference, 1)
                b_row_term += tl.sum(2.0 * b_difference * b_p_s, 1)
            else:
                b_total += tl.sum(b_p_t * b_ratio, 1) * 0.6931471805599453
        if GRAD:
            b_grad_scores = _score_gradient(b_p_s, b_p_t, b_row_term, MSE)
            b_grad_q += _dot(b_grad_scores.to(b_k_s.dtype), b_k_s)
    if LOSS:
        tl.store(total + i_lbh * TILES + i_0 // BI, tl.sum(b_total, 0))
        if not (CAUSAL or LENGTHS or MASK != 0):
            b_keys = tl.where(m_i, M, 0).to(tl.float32)
        b_terms = b_keys if MSE else tl.minimum(b_keys, 1.0)
        tl.store(count + i_lbh * TILES + i_0 // BI, tl.sum(b_terms, 0))
        if MSE:
            tl.store(row_term + i_lbh * N + o_i, b_row_term, mask=m_i)
    if GRAD:
        tl.store(p_grad_q, b_grad_q * grad_scale, mask=m_grad_q)


@triton.jit
def key_kernel(
    q_s,
    k_s,
    q_t,
    k_t,
    s_q_s,
    s_k_s,
    s_q_t,
    s_k_t,
    mask,
    s_mask,
    key_lengths,
    gate,
    lse_s,
    lse_t,
    row_term,
    grad_k,
    H,
    N,
    M,
    TILES,
    scale_s,
    scale_t,
    grad_scale,
    LAYERS: tl.constexpr,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    BD_S: tl.constexpr,
    BD_T: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    MSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    LENGTHS: tl.constexpr,
    MASK: tl.constexpr,
    LOWEST: tl.constexpr,
    GATED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """grad_k [B, H, M, D_S] a layer, contiguous float32; keys that nobody attends to get zeros."""
    i_l, i_b, i_h, i_lbh, j_0 = _where_am_i(H, TILES, BJ)
    o_j = j_0 + tl.arange(0, BJ)
    m_j = o_j < M
    o_d = tl.arange(0, BD_S)
    grad_k = _of_layer(grad_k, i_l, LAYERS) + ((i_b * H + i_h) * M + j_0) * D_S
    p_grad_k = grad_k + tl.arange(0, BJ)[:, None] * D_S + o_d[None, :]
    m_grad_k = m_j[:, None] & (o_d < D_S)[None, :]
    if GATED:  # noqa: SIM102
        if tl.load(gate + i_l) == 0:
            tl.store(p_grad_k, tl.zeros([BJ, BD_S], tl.float32), mask=m_grad_k)
            return
    length = _length(key_lengths, i_l, i_b, M, LAYERS, LENGTHS)
    if MASK != 0:
        mask = _head(mask, i_l, i_b, i_h, s_mask, LAYERS)
    q_s = _head(q_s, i_l, i_b, i_h, s_q_s, LAYERS)
    k_s = _head(k_s, i_l, i_b, i_h, s_k_s, LAYERS)
    q_t = _head(q_t, i_l, i_b, i_h, s_q_t, LAYERS)
    k_t = _head(k_t, i_l, i_b, i_h, s_k_t, LAYERS)
    b_k_s = _rows(k_s, o_j, s_k_s[2], m_j, D_S, BD_S, WIDEN)
    b_k_t = _rows(k_t, o_j, s_k_t[2], m_j, D_T, BD_T, WIDEN)
    b_grad_k = tl.zeros([BJ, BD_S], tl.float32)
    start = 0
    if CAUSAL:
        start = j_0 // BI * BI
    end = N
    if LENGTHS:
        end = tl.where(j_0 < length, N, 0)
    for i_0 in range(start, end, BI):
        o_i = i_0 + tl.arange(0, BI)
        m_i = o_i < N
        b_q_s = _rows(q_s, o_i, s_q_s[2], m_i, D_S, BD_S, WIDEN)
        b_q_t = _rows(q_t, o_i, s_q_t[2], m_i, D_T, BD_T, WIDEN)
        b_lse_s = tl.load(lse_s + i_lbh * N + o_i, mask=m_i, other=0.0)
        b_lse_t = tl.load(lse_t + i_lbh * N + o_i, mask=m_i, other=0.0)
        b_row_term = tl.zeros([BI], tl.float32)
        if MSE:
            b_row_term = tl.load(row_term + i_lbh * N + o_i, mask=m_i, other=0.0)
        m_ij, b_bias = _attends(mask, s_mask, i_0, o_i, o_j, m_i, m_j, length, CAUSAL, MASK, LOWEST)
        b_p_s, b_p_t, _ = _maps(b_q_s, b_k_s, b_q_t, b_k_t, b_lse_s, b_lse_t, scale_s, scale_t, m_ij, b_bias)
        b_grad_scores = _score_gradient(b_p_s, b_p_t, b_row_term, MSE)
        b_grad_k += _dot(tl.trans(b_grad_scores).to(b_q_s.dtype), b_q_s)
    tl.store(p_grad_k, b_grad_k * grad_scale, mask=m_grad_k)


class Tiling(NamedTuple):
    """How a kernel is cut: queries and keys of a tile, and what the compiler is told."""

    queries: int
    keys: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        return {"BI": self.queries, "BJ": self.keys, "num_warps": self.warps, "num_stages": self.stages}


def tiling(
    walk: Literal["keys", "queries"], width: int, dtype: torch.dtype, target: str, masked: bool, lone_loss: bool = False
) -> Tiling:
    """The tiling of a kernel that walks over keys or over queries.

    `width` is the wider side's padded head width, `target` "sm_80", ..., "gfx942" or "interpreter", and `masked` tells
    whether any rule but the ends of the tensors decides who attends to whom, `lone_loss` whether it is `query_kernel`
    without a gradient, whose tiles have as many queries as those with one.

    Fixed, not tuned at run time. Chosen from compiled code: no spilled register for widths up to 128 in bf16 and
    float32 on any target, and 64 rows where a warp group's matrix instruction wants them. The walk over keys holds both
    maps and the loss, hence fewer keys, and more warps where masks come on top. float32 takes twice the room, and on
    NVIDIA its products are multiply-adds that hold their operands in registers.
    """
    if target == "interpreter":
        return Tiling(32, 32, 4, 1)
    if dtype == torch.float32:
        if walk == "keys" and width <= 64 and not masked and target.startswith("sm_8"):
            return Tiling(16, 32, 4, 1)
        narrow = width > 64 or (masked and target.startswith(("sm_8", "sm_10")))
        # With no gradient to hold, compilers for NVIDIA keep rows in registers, more than four warps have.
        spread = lone_loss and width > 64 and not (masked or target.startswith("gfx"))
        return Tiling(32, 16 if narrow else 32, 8 if spread else 4, 1)
    if target.startswith("gfx"):
        return Tiling(32, 64, 4, 1) if width <= 128 else Tiling(32, 32, 4, 1)
    if walk == "keys":
        # Two stages spill 8 bytes a thread on sm_100.
        deep = width <= 64 or (width <= 128 and not (masked and target.startswith("sm_10")))
        return Tiling(64, 32, 8 if masked or width > 128 else 4, 2 if deep else 1)
    if masked and target.startswith("sm_8"):
        return Tiling(32, 64, 8, 2)
    if masked and target == "sm_90" and width > 64:
        return Tiling(64, 32, 8, 2)
    if width <= 64:
        return Tiling(64, 64, 4, 2)
    return Tiling(64, 64, 8, 2) if width <= 128 else Tiling(64, 32, 8, 1)


def attention_map_sums(
    layers: Sequence[MapLayer], options: MapOptions, with_grad: bool, gate: Tensor | None
) -> list[MapSums]:
    """Sums, counts and gradients of every layer, layers that look alike in one launch a kernel.

    Means over heads go to the blocked backend, on the same device: there the gradient at an element needs all heads'
    maps at once, which a program could only have by recomputing them H times over.
    """
    if options.mean_heads:
        return blocked.attention_map_sums(layers, options, with_grad)
    results: dict[int, MapSums] = {}
    layers = [_readable(layer) for layer in layers]
    for members in _alike(layers):
        gates = None if gate is None else torch.stack([gate[i] for i in members]).float()
        results |= zip(members, _launch([layers[i] for i in members], options, with_grad, gates), strict=True)
    return [results[i] for i in range(len(layers))]


def _readable(layer: MapLayer) -> MapLayer:
    """q and k with features next to each other, and a mask with a stride (0 where it broadcasts) in each dimension."""
    tensors: dict[str, Any] = {
        name: x if x.stride(-1) == 1 else x.contiguous() for name, x in zip(layer._fields, layer[:4], strict=False)
    }
    if layer.mask is not None:
        mask = layer.mask.float() if layer.mask.dtype == torch.float64 else layer.mask
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        tensors["mask"] = mask.expand(*layer.q_s.shape[:3], layer.k_s.shape[2])
    if layer.key_lengths is not None:
        tensors["key_lengths"] = layer.key_lengths.contiguous()
    return layer._replace(**tensors)


def _alike(layers: Sequence[MapLayer]) -> Iterator[list[int]]:
    """Indices of layers that one launch can serve."""
    groups: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        key = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in layer)
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        for first in range(0, len(members), MOST_LAYERS_PER_LAUNCH):
            yield members[first : first + MOST_LAYERS_PER_LAUNCH]


def _launch(layers: Sequence[MapLayer], options: MapOptions, with_grad: bool, gate: Tensor | None) -> list[MapSums]:
    first = layers[0]
    batch, heads, queries, d_s = first.q_s.shape
    keys, d_t = first.k_s.shape[2], first.q_t.shape[3]
    target, width = target_of(first.q_s.device), _padded(max(d_s, d_t))
    masked = options.causal or first.mask is not None or first.key_lengths is not None
    over_queries = tiling("queries", width, first.q_s.dtype, target, masked)
    over_keys, lone_loss = (tiling("keys", width, first.q_s.dtype, target, masked, lone) for lone in (False, True))
    row_tiles, key_tiles = triton.cdiv(queries, over_keys.queries), triton.cdiv(keys, over_queries.keys)
    mse = options.kind == "mse"

    def pointers(name: str) -> tuple[Tensor, ...] | None:
        return tuple(getattr(layer, name) for layer in layers) if getattr(first, name) is not None else None

    def rows(extent: int) -> Tensor:
        return first.q_s.new_empty((len(layers), batch, heads, extent), dtype=torch.float32)

    shared: dict[str, Any] = {
        "mask": pointers("mask"),
        "s_mask": None if first.mask is None else first.mask.stride(),
        "key_lengths": pointers("key_lengths"),
        "gate": gate,
        "H": heads,
        "N": queries,
        "M": keys,
        "LAYERS": len(layers),
        "CAUSAL": options.causal,
        "LENGTHS": first.key_lengths is not None,
        "MASK": _mask_kind(first.mask),
        "LOWEST": torch.finfo(first.mask.dtype).min
        if first.mask is not None and first.mask.is_floating_point()
        else 0.0,
        "GATED": gate is not None,
        "WIDEN": INTERPRETED,  # its bf16 products are wrong
    }
    log_sums = {}
    for side, scale in (("s", first.scale_s), ("t", first.scale_t)):
        given = pointers(f"lse_{side}")
        if given is not None:
            log_sums[f"lse_{side}"] = torch.stack(given).float() * LOG2E
            continue
        log_sums[f"lse_{side}"] = rows(queries)
        width = getattr(first, f"q_{side}").shape[-1]
        lse_kernel[(row_tiles * batch * heads, len(layers))](
            q=pointers(f"q_{side}"),
            k=pointers(f"k_{side}"),
            s_q=getattr(first, f"q_{side}").stride(),
            s_k=getattr(first, f"k_{side}").stride(),
            lse=log_sums[f"lse_{side}"],
            TILES=row_tiles,
            scale=scale * LOG2E,
            D=width,
            BD=_padded(width),
            **over_keys.launch(),
            **shared,
        )
    shared |= log_sums | {name: pointers(name) for name in ("q_s", "k_s", "q_t", "k_t")}
    shared |= {f"s_{name}": getattr(first, name).stride() for name in ("q_s", "k_s", "q_t", "k_t")}
    shared |= {"D_S": d_s, "D_T": d_t, "BD_S": _padded(d_s), "BD_T": _padded(d_t), "MSE": mse}
    shared |= {"scale_s": first.scale_s * LOG2E, "scale_t": first.scale_t * LOG2E, "grad_scale": first.scale_s}
    shared["row_term"] = rows(queries) if mse else None
    total, count = rows(row_tiles), rows(row_tiles)
    gradients = [empty_gradients(layer) if with_grad else (None, None) for layer in layers]
    grad_q, grad_k = (tuple(side) for side in zip(*gradients, strict=True)) if with_grad else (None, None)
    grid = (row_tiles * batch * heads, len(layers))
    walks = [(True, False), (False, True)] if mse and with_grad else [(True, with_grad)]
    for loss, grad in walks:
        query_kernel[grid](
            total=total if loss else None,
            count=count if loss else None,
            grad_q=grad_q if grad else None,
            TILES=row_tiles,
            LOSS=loss,
            GRAD=grad,
            **(over_keys if grad else lone_loss).launch(),
            **shared,
        )
    if with_grad:
        key_kernel[(key_tiles * batch * heads, len(layers))](
            grad_k=grad_k, TILES=key_tiles, **over_queries.launch(), **shared
        )
    totals, counts = total.sum((2, 3)), count.sum((2, 3))
    return [MapSums(totals[i], counts[i], *gradients[i]) for i in range(len(layers))]


def _mask_kind(mask: Tensor | None) -> int:
    if mask is None:
        return NO_MASK
    return BOOL_MASK if mask.dtype == torch.uint8 else ADDITIVE_MASK


def _padded(width: int) -> int:
    """Head width as a tile has it: a power of two that a matrix instruction takes."""
    return max(16, int(triton.next_power_of_2(width)))
