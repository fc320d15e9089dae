"""Vocabulary divergence kernels: chunks of tokens in preallocated scratch, gradients in the forward pass.

For a chunk of tokens `logits_kernel` makes each model's logits and, while a tile of them is in registers, that tile's
share of the log-sum-exp (its maximum, and the sum of exponentials below it); `lse_kernel` joins the shares online. So
the logits are written once, and `divergence_kernel`, which turns them into the gradient in them, reads them once.
Reverse KL and Jensen-Shannon need the value of a row before its gradient, and so a second launch of that kernel.
Products of the gradient with head and state follow, in the kernels of `products`, which a closed gate stops.

Why chunks and not recomputed tiles, counted at 2048 tokens, V = 49408 and widths 512 and 768 in bf16. Recomputing in
the gradients of state and head (what cut cross entropy does) takes 4864 multiply-adds for every logit instead of 2304,
at 400 to 600 TFLOP/s 1.6 to 2.4 ms on an H100. Chunks add 20 bytes of traffic for every logit, 0.7 ms at 3 TB/s, to
0.7 to 1.2 ms of products. The wider the models, the more the products weigh. What chunks cost is scratch, bounded by
`CHUNK_ELEMENTS` whatever the number of tokens.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optima_kernels.logits.problem import Gradients, Problem
from optima_kernels.shared.dispatch import INTERPRETED
from optima_kernels.shared.products import (
    is_closed,
    project_tile,
    state_kernel,
    store_tile,
    tiling,
    weight_kernel,
)
from optima_kernels.shared.target import target_of

# Logits of one model in a chunk: 64 MB of float32. A chunk has a multiple of 128 tokens where that leaves any.
CHUNK_ELEMENTS = 2**24
VOCABULARY_TILE = 4096
DIVERGENCE = {"forward": 0, "reverse": 1, "jsd": 2}


@triton.jit
def logits_kernel(
    h, weight, bias, counts, gate, z, shares, inverse_temperature, T, V, D, s_h, s_weight,
    GATED: tl.constexpr, BIASED: tl.constexpr, WIDEN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z [T, V] = h weight^T + bias, and of each row's part in a tile of the vocabulary: its maximum m, and the sums of
    exp((z - m) / temperature) and of exp(z - m), as shares [tiles, 3, T]. Tokens that do not count get zeros for h."""
    if is_closed(gate, 0, GATED):
        return
    tiles = tl.cdiv(V, BC)
    i_c = tl.program_id(0) % tiles
    o_r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
    o_c = i_c * BC + tl.arange(0, BC)
    m_r, m_c = o_r < T, o_c < V
    m_counts = m_r & (tl.load(counts + o_r, mask=m_r, other=0) != 0)
    b_z = project_tile(h, weight, o_r, o_c, m_counts, m_c, D, s_h, s_weight, BR, BC, BK, WIDEN)
    if BIASED:
        b_z += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    store_tile(z, o_r, o_c, V, m_r, m_c, b_z)
    b_max = tl.max(tl.where(m_c[None, :], b_z, float("-inf")), 1)
    b_below = b_z - b_max[:, None]
    p_share = shares + i_c * 3 * T + o_r
    b_tempered = tl.where(m_c[None, :], tl.exp(b_below * inverse_temperature), 0.0)
    tl.store(p_share, b_max, mask=m_r)
    tl.store(p_share + T, tl.sum(b_tempered, 1), mask=m_r)
    tl.store(p_share + 2 * T, tl.sum(tl.where(m_c[None, :], tl.exp(b_below), 0.0), 1), mask=m_r)


@triton.jit
def lse_kernel(shares, gate, lse, inverse_temperature, T, TILES, GATED: tl.constexpr, BR: tl.constexpr):
    """Joins shares [TILES, 3, T] online to lse [3, T]: the maximum m of a row, and the logarithms of the sums of
    exp((z - m) / temperature) and of exp(z - m). Kept apart: beside a maximum of 1e4, float32 has 1e-3 to spare."""
    if is_closed(gate, 0, GATED):
        return
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < T
    b_max = tl.load(shares + o_r, mask=m_r, other=0.0)
    b_tempered, b_plain = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
    for i_c in range(0, TILES):
        p_share = shares + i_c * 3 * T + o_r
        b_new = tl.load(p_share, mask=m_r, other=0.0)
        b_next = tl.maximum(b_max, b_new)
        b_old, b_new = b_max - b_next, b_new - b_next
        b_tempered *= tl.exp(b_old * inverse_temperature)
        b_tempered += tl.load(p_share + T, mask=m_r, other=0.0) * tl.exp(b_new * inverse_temperature)
        b_plain *= tl.exp(b_old)
        b_plain += tl.load(p_share + 2 * T, mask=m_r, other=0.0) * tl.exp(b_new)
        b_max = b_next
    tl.store(lse + o_r, b_max, mask=m_r)
    tl.store(lse + T + o_r, tl.log(b_tempered), mask=m_r)
    tl.store(lse + 2 * T + o_r, tl.log(b_plain), mask=m_r)


@triton.jit
def _exp_beyond_line(b_x):
    """e^x - 1 - x by its series, for |x| <= 0.3: what is left out is 4e-8 of it."""
    b_series = 1.0 / 120.0 + b_x * (1.0 / 720.0 + b_x * (1.0 / 5040.0))
    return b_x * b_x * (0.5 + b_x * (1.0 / 6.0 + b_x * (1.0 / 24.0 + b_x * b_series)))


@triton.jit
def _divergence_terms(b_p, b_q, b_log):
    """Terms of KL(p || q) that are not negative, with log = log(q / p): p (e^log - 1 - log), which is q - p - p log.

    Their sum is that of -p log, since p and q both sum to 1. But those are of first order where p and q are alike, and
    their sum of second: it would be lost in their rounding.
    """
    return tl.where(tl.abs(b_log) <= 0.3, b_p * _exp_beyond_line(b_log), b_q - b_p - b_p * b_log)


@triton.jit
def _log_mixture(b_log, log_beta, log_rest):
    """log(beta + rest e^log), beta + rest being 1, as accurate near 0 as elsewhere."""
    b_max = tl.maximum(log_beta, b_log + log_rest)
    b_far = b_max + tl.log(tl.exp(log_beta - b_max) + tl.exp(b_log + log_rest - b_max))
    b_x = tl.exp(log_rest) * (b_log + _exp_beyond_line(b_log))
    b_half = b_x / (2.0 + b_x)  # log(1 + x) = 2 artanh(x / (2 + x))
    b_square = b_half * b_half
    b_near = 2.0 * b_half * (1.0 + b_square * (1.0 / 3.0 + b_square * (1.0 / 5.0 + b_square * (1.0 / 7.0))))
    return tl.where(tl.abs(b_log) <= 0.3, b_near, b_far)


@triton.jit
def divergence_kernel(
    z_s, z_t, lse_s, lse_t, divergence_weight, labels, label_weight, gate, row_value, value, gradient,
    inverse_temperature, log_beta, log_rest, T, V,
    GATED: tl.constexpr, KIND: tl.constexpr, LABELS: tl.constexpr, VALUE: tl.constexpr, GRADIENT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """One token's part of a tile of the vocabulary.

    VALUE: what it adds to the divergence, to the sum that the gradient of reverse KL and Jensen-Shannon needs, and to
    the weighted cross entropy: value [3, T, tiles]. GRADIENT: in the logits, times temperature; it may lie where z_s
    does. A label of -1 is none.
    """
    i_c, i_r = tl.program_id(0), tl.program_id(1)
    p_value = value + i_r * tl.num_programs(0) + i_c
    s_kind = T * tl.num_programs(0)
    if is_closed(gate, 0, GATED):
        if VALUE:
            for i in tl.static_range(3):
                tl.store(p_value + i * s_kind, 0.0)
        return
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < V
    o_z = i_r.to(tl.int64) * V + o_c
    b_sum_s, b_sum_t = tl.load(lse_s + T + i_r), tl.load(lse_t + T + i_r)
    b_below_s = tl.load(z_s + o_z, mask=m_c, other=0.0) - tl.load(lse_s + i_r)
    b_below_t = tl.load(z_t + o_z, mask=m_c, other=0.0) - tl.load(lse_t + i_r)
    b_p_s = tl.where(m_c, tl.exp(b_below_s * inverse_temperature - b_sum_s), 0.0)
    b_p_t = tl.where(m_c, tl.exp(b_below_t * inverse_temperature - b_sum_t), 0.0)
    # log(P_s / P_t): one rounded number a row is taken from a difference of logits, not two rounded logarithms apart.
    b_ratio = (b_below_s - b_below_t) * inverse_temperature - (b_sum_s - b_sum_t)
    if KIND == 0:
        b_terms = _divergence_terms(b_p_t, b_p_s, b_ratio)
        b_slope = b_p_s - b_p_t
        b_student = b_terms
    if KIND == 1:
        b_student = b_p_s * b_ratio
        b_terms = _divergence_terms(b_p_s, b_p_t, -b_ratio)
        b_slope = b_ratio
    if KIND == 2:
        b_log_m = _log_mixture(b_ratio, log_beta, log_rest)
        b_slope = -_log_mixture(-b_ratio, log_rest, log_beta)  # not the ratio less b_log_m: both may be of 1e4
        b_student = b_p_s * b_slope
        b_far = -tl.exp(log_beta) * b_p_t * b_log_m + tl.exp(log_rest) * b_student
        b_near = tl.exp(log_beta) * b_p_t * _exp_beyond_line(b_log_m)
        b_near += tl.exp(log_rest) * b_p_s * _exp_beyond_line(-b_slope)
        b_terms = tl.where(tl.abs(b_ratio) <= 0.3, b_near, b_far)
        b_slope *= tl.exp(log_rest)
    if VALUE:
        tl.store(p_value, tl.sum(tl.where(m_c, b_terms, 0.0), 0))
        tl.store(p_value + s_kind, tl.sum(tl.where(m_c, b_student, 0.0), 0))
    if LABELS:
        b_label_weight = tl.load(label_weight + i_r)
        m_label = o_c == tl.load(labels + i_r)
        b_log_p = b_below_s - tl.load(lse_s + 2 * T + i_r)
        if VALUE:
            tl.store(p_value + 2 * s_kind, -tl.sum(tl.where(m_label, b_log_p, 0.0), 0) * b_label_weight)
    if GRADIENT:
        if KIND != 0:
            b_row = tl.load(row_value + i_r)
            if KIND == 2:
                b_row *= tl.exp(log_rest)
            b_slope = b_p_s * (b_slope - b_row)
        b_slope *= tl.load(divergence_weight + i_r)
        if LABELS:
            b_slope += (tl.exp(b_log_p) - tl.where(m_label, 1.0, 0.0)) * b_label_weight
        tl.store(gradient + o_z, b_slope.to(gradient.dtype.element_ty), mask=m_c)


def sweep(
    problem: Problem,
    divergence_weight: Tensor,
    labels: Tensor | None,
    label_weight: Tensor | None,
    wants: tuple[bool, bool, bool],
    gate: Tensor | None,
) -> tuple[Tensor, Gradients]:
    """See `logits_problem`. A closed gate gives zeros."""
    p = _dense(problem)
    tokens, vocabulary = p.h_s.shape[0], p.w_s.shape[0]
    tile = tiling(target_of(p.h_s.device), p.h_s.dtype != torch.float32)
    counts = divergence_weight != 0
    if labels is not None and label_weight is not None:
        labels = labels.masked_fill(label_weight == 0, -1)
        counts = counts | (label_weight != 0)
    counts = counts.to(torch.uint8)
    gradients = Gradients.empty(p, wants)
    chunk = min(chunk_tokens(vocabulary), tokens)
    scratch = [p.h_s.new_empty((chunk, vocabulary), dtype=torch.float32) for _ in range(2)]
    narrow = any(wants) and p.h_s.dtype != torch.float32
    d_logits = p.h_s.new_empty((chunk, vocabulary)) if narrow else scratch[0]
    vocabulary_tiles = triton.cdiv(vocabulary, VOCABULARY_TILE)
    sums = p.h_s.new_zeros(2, dtype=torch.float32)
    gated: dict[str, Any] = {"gate": gate if gate is None else gate.reshape(1), "GATED": gate is not None}
    dots = {"WIDEN": INTERPRETED, **tile.options()}  # the interpreter's bf16 products are wrong

    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        size = rows.stop - start
        lse_s = _logits(p.h_s[rows], p.w_s, p.bias_s, counts[rows], scratch[0], p.temperature, gated, dots)
        lse_t = _logits(p.h_t[rows], p.w_t, p.bias_t, counts[rows], scratch[1], p.temperature, gated, dots)
        value = p.h_s.new_zeros((3, size, vocabulary_tiles), dtype=torch.float32)
        arguments: dict[str, Any] = {
            "z_s": scratch[0],
            "z_t": scratch[1],
            "lse_s": lse_s,
            "lse_t": lse_t,
            "divergence_weight": divergence_weight[rows],
            "labels": None if labels is None else labels[rows],
            "label_weight": None if label_weight is None else label_weight[rows],
            "value": value,
            "gradient": d_logits,
            "inverse_temperature": 1.0 / p.temperature,
            "log_beta": math.log(p.beta) if p.divergence == "jsd" else 0.0,
            "log_rest": math.log1p(-p.beta) if p.divergence == "jsd" else 0.0,
            "T": size,
            "V": vocabulary,
            "KIND": DIVERGENCE[p.divergence],
            "LABELS": labels is not None,
            "BC": min(VOCABULARY_TILE, triton.next_power_of_2(vocabulary)),
            "num_warps": 8,
            **gated,
        }
        grid = (vocabulary_tiles, size)
        at_once = any(wants) and p.divergence == "forward"
        divergence_kernel[grid](row_value=None, VALUE=True, GRADIENT=at_once, **arguments)
        values = value.sum(2)
        sums[0] += values[0].dot(divergence_weight[rows])
        sums[1] += values[2].sum()
        if any(wants) and not at_once:
            divergence_kernel[grid](row_value=values[1], VALUE=False, GRADIENT=True, **arguments)
        _spend(p, rows, d_logits, counts, gradients, wants, gated, dots)
    return sums, gradients


def chunk_tokens(vocabulary: int) -> int:
    tokens = max(CHUNK_ELEMENTS // vocabulary, 1)
    return tokens // 128 * 128 if tokens >= 128 else tokens


def _dense(problem: Problem) -> Problem:
    """Every tensor with the elements of a row next to each other."""
    tensors = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in problem[:6])
    return problem._replace(**dict(zip(problem._fields, tensors, strict=False)))  # type: ignore[arg-type]


def _logits(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    z: Tensor,
    temperature: float,
    gated: dict[str, Any],
    dots: dict[str, Any],
) -> Tensor:
    """Fills `z` with the logits of a chunk, and returns what `lse_kernel` makes of them: [3, T]."""
    (tokens, d), vocabulary = h.shape, weight.shape[0]
    tiles = triton.cdiv(vocabulary, dots["BC"])
    shares = z.new_empty((tiles, 3, tokens))
    lse = z.new_empty((3, tokens))
    logits_kernel[(triton.cdiv(tokens, dots["BR"]) * tiles,)](
        h=h,
        weight=weight,
        bias=bias,
        counts=counts,
        z=z,
        shares=shares,
        inverse_temperature=1.0 / temperature,
        T=tokens,
        V=vocabulary,
        D=d,
        s_h=h.stride(0),
        s_weight=weight.stride(0),
        BIASED=bias is not None,
        **gated,
        **dots,
    )
    lse_kernel[(triton.cdiv(tokens, 128),)](
        shares=shares, lse=lse, inverse_temperature=1.0 / temperature, T=tokens, TILES=tiles, BR=128, **gated
    )
    return lse


def _spend(
    p: Problem,
    rows: slice,
    d_logits: Tensor,
    counts: Tensor,
    gradients: Gradients,
    wants: tuple[bool, bool, bool],
    gated: dict[str, Any],
    dots: dict[str, Any],
) -> None:
    """Adds a chunk's part to the gradients."""
    size, d_s, vocabulary = rows.stop - rows.start, p.h_s.shape[1], p.w_s.shape[0]
    if wants[0]:
        state_kernel[(triton.cdiv(size, dots["BR"]) * triton.cdiv(d_s, dots["BC"]), 1)](
            g=(d_logits,),
            weight=(p.w_s,),
            out=(gradients.state[rows],),
            T=size,
            D_OUT=vocabulary,
            D_IN=d_s,
            s_g=vocabulary,
            s_weight=p.w_s.stride(0),
            s_out=d_s,
            LAYERS=1,
            **gated,
            **dots,
        )
    if wants[1] or wants[2]:
        columns = triton.cdiv(d_s, dots["BC"]) if wants[1] else 1
        weight_kernel[(triton.cdiv(vocabulary, dots["BR"]) * columns, 1)](
            g=(d_logits,),
            x=(p.h_s[rows],),
            token_weight=(counts[rows],),
            out=(gradients.head,),
            bias_out=(gradients.bias,),
            T=size,
            D_OUT=vocabulary,
            D_IN=d_s,
            s_g=vocabulary,
            s_x=p.h_s.stride(0),
            s_out=d_s,
            WEIGHTED=True,
            WEIGHT=wants[1],
            BIAS=wants[2],
            ACCUMULATE=rows.start > 0,
            LAYERS=1,
            **gated,
            **dots,
        )
