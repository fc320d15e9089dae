"""Attention-map loss over tiles of queries: two score tiles live at a time, never a map.

A tile is a few heads, some queries and all keys they may attend to, so a row's softmax needs no online rescaling. The
loss and both gradients come out of one visit to the tile, while its scores are still in the cache: four matrix
products (two of scores, two of gradients) where recomputing the scores in a separate backward would need six. What is
kept for backward is the gradients themselves, of the size of q and k, and not one teacher tensor.

Everything element-wise is in place, in base-2 logarithms: log2(e) rides for free in the matrix product's scale, and
torch's exp2 was measured three times as fast as its exp on AVX-512.

Where the log-sum-exp of the rows is known, a map is one exp2 away from its scores: a row maximum, a row sum and a
division less.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optima_kernels.attention.problem import (
    Layer,
    Options,
    Solution,
    empty_gradients,
    gradient_factor,
    known_terms,
)
from optima_kernels.shared.cpu_products import is_faster, products
from optima_kernels.shared.dispatch import compute_dtype
from optima_kernels.shared.gates import closed_gates
from optima_kernels.shared.scratch import Scratch

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# Scores per tile. On CPU three tiles of 2^19 floats stay in the cache; smaller tiles pay more for each torch call,
# larger ones go to memory. On a GPU a tile has to fill the device. A tile for means over heads holds all heads, of too
# few queries for good products on a CPU unless it is larger: measured at 577 tokens and 16 heads, 138 ms a layer in
# tiles of 2^20 scores, 109 ms in tiles of 2^22.
TILE_ELEMENTS = {"cpu": 1 << 19}
TILE_ELEMENTS_OTHERWISE = 1 << 24
LARGER_FOR_MEANS = 8

# What a forbidden score becomes: finite, so that differences of forbidden scores are 0 and not NaN, and so low that
# every exp2 of it is 0 in float32. A row with nothing to attend to becomes the same uniform row on both sides, which
# is a loss and a gradient of exactly 0.
FORBIDDEN = -1e30


class Tile(NamedTuple):
    """Samples, heads and queries of a tile as slices, and how many of the first keys they may attend to."""

    samples: slice
    heads: slice
    queries: slice
    keys: int


def solve(layers: Sequence[Layer], options: Options, gate: Tensor | None) -> list[Solution]:
    """Every layer's sums and gradients, one layer after the other; `gate` [L] on their device."""
    with torch.no_grad(), torch.autocast(layers[0].q_s.device.type, enabled=False):
        return [
            _nothing(layer, options) if closed else _solve(layer, options)
            for layer, closed in zip(layers, closed_gates(gate, len(layers)), strict=True)
        ]


def _nothing(layer: Layer, options: Options) -> Solution:
    """What a layer behind a closed gate has."""
    gradients = [x.zero_() for x in empty_gradients(layer, "blocked")] if options.with_grad else [None, None]
    zeros, known = layer.q_s.new_zeros(layer.q_s.shape[0], dtype=compute_dtype(*layer[:4])), known_terms(layer, options)
    return Solution(zeros, zeros if known is None else known, *gradients)


def _solve(layer: Layer, options: Options) -> Solution:
    q_s, k_s, q_t, k_t = layer[:4]
    dtype = compute_dtype(q_s, k_s, q_t, k_t)
    batch = q_s.shape[0]
    total = q_s.new_zeros(batch, dtype=dtype)
    known = known_terms(layer, options)
    terms = q_s.new_zeros(batch, dtype=dtype) if known is None else known
    # A product that writes whole rows of M keys was measured a quarter faster than one that writes rows of d.
    grad_q, grad_k = empty_gradients(layer, "blocked") if options.with_grad else (None, None)
    if grad_k is not None:
        grad_k.zero_()
    scratch = Scratch(q_s.device, dtype)
    compare = _compare_kl if options.kind == "kl" else _compare_mse
    compare_means = _compare_mean_kl if options.kind == "kl" else _compare_mean_mse
    # MSE's score gradients come halved.
    scale = layer.scale_s * (2.0 if options.kind == "mse" else 1.0) * gradient_factor(layer, options)

    for tile in _tiles(layer, options):
        b, h_s = tile.samples, tile.heads
        h_t = slice(0, q_t.shape[1]) if options.mean_heads else h_s
        attends, bias = _attends(layer, options, tile), _bias(layer, tile, dtype)
        lse_s, lse_t = _known_rows(layer, tile, h_t, attends is not None, dtype)
        q, k = q_s[b, h_s, tile.queries].to(dtype), _keys_of(k_s, q_s.shape[1], tile, h_s).to(dtype)
        rows_s = _Rows(scratch.tile("student", (*q.shape[:3], tile.keys)), lse_s is not None)
        _fill_scores(rows_s.scores, q, k, layer.scale_s * LOG2E, attends, bias, lse_s)
        q, k = q_t[b, h_t, tile.queries].to(dtype), _keys_of(k_t, q_t.shape[1], tile, h_t).to(dtype)
        rows_t = _Rows(scratch.tile("teacher", (*q.shape[:3], tile.keys)), lse_t is not None)
        _fill_scores(rows_t.scores, q, k, layer.scale_t * LOG2E, attends, bias, lse_t)

        if options.mean_heads:
            counted = None if attends is None else attends.any(-1, keepdim=True)
            sums, grad_scores = compare_means(rows_s, rows_t, counted, scratch)
        else:
            sums, grad_scores = compare(rows_s, rows_t, scratch)
        total[b] += sums
        if isinstance(terms, Tensor) and attends is not None:
            maps = 1 if options.mean_heads else rows_s.scores.shape[1]
            terms[b] += _count(attends, options.kind, (rows_s.scores.shape[0], maps, *rows_s.scores.shape[2:]))
        if grad_q is not None and grad_k is not None:
            _add_gradients(grad_scores, layer, tile, scale, grad_q, grad_k)
    return Solution(total, terms, grad_q, grad_k)


def _keys_of(k: Tensor, query_heads: int, tile: Tile, heads: slice) -> Tensor:
    """For each of a tile's query heads the keys that it reads: [b, h, m, d], a view where every head has its own."""
    group = query_heads // k.shape[1]
    if group == 1:
        return k[tile.samples, heads, : tile.keys]
    return k[tile.samples, :, : tile.keys][:, torch.arange(heads.start, heads.stop, device=k.device) // group]


class _Rows(NamedTuple):
    """Scores in base 2, less their row's maximum, or less its log-sum-exp: then they are the logarithms of a map."""

    scores: Tensor
    normalised: bool


def _tiles(layer: Layer, options: Options) -> Iterator[Tile]:
    batch, heads, queries, _ = layer.q_s.shape
    keys = layer.k_s.shape[2]
    budget = TILE_ELEMENTS.get(layer.q_s.device.type, TILE_ELEMENTS_OTHERWISE)
    heads_at_once = max(heads, layer.q_t.shape[1]) if options.mean_heads else 1
    budget *= LARGER_FOR_MEANS if options.mean_heads and layer.q_s.device.type == "cpu" else 1
    query_step = _even_step(queries, budget // (heads_at_once * keys))
    head_step = heads if options.mean_heads else _even_step(heads, budget // (query_step * keys))
    whole_samples = budget // (max(heads_at_once, heads) * query_step * keys) if head_step == heads else 1
    sample_step = _even_step(batch, whole_samples)
    for b in range(0, batch, sample_step):
        for h in range(0, heads, head_step):
            for i in range(0, queries, query_step):
                end = min(i + query_step, queries)
                attended = min(keys, end) if options.causal else keys
                samples, of_heads = slice(b, min(b + sample_step, batch)), slice(h, min(h + head_step, heads))
                yield Tile(samples, of_heads, slice(i, end), attended)


def _even_step(length: int, most: int) -> int:
    """The step that cuts `length` into as few parts as `most` allows, all of about one size."""
    parts = -(-length // max(1, most))
    return -(-length // parts)


def _fill_scores(
    out: Tensor, q: Tensor, k: Tensor, scale: float, attends: Tensor | None, bias: Tensor | None, lse: Tensor | None
) -> None:
    """See `_Rows`; `lse` is in base 2, [b, h, n, 1]."""
    q, k, flat = q.flatten(0, 1), k.flatten(0, 1), out.flatten(0, 1)
    if not is_faster(q[0].numel() * k.shape[1], q, k):
        torch.baddbmm(flat, q, k.transpose(1, 2), beta=0, alpha=scale, out=flat)
    elif attends is None:
        known = None if lse is None else lse.flatten(0, 1)
        for i, (scores, of_map) in enumerate(zip(products(q * scale, k.transpose(1, 2)), flat, strict=True)):
            torch.sub(scores, scores.amax(-1, keepdim=True) if known is None else known[i], out=of_map)
        return
    else:
        for scores, of_map in zip(products(q * scale, k.transpose(1, 2)), flat, strict=True):
            of_map.copy_(scores)
    if attends is not None:
        if bias is not None:
            out.add_(bias)
        out.masked_fill_(~attends, FORBIDDEN)
    out.sub_(out.amax(-1, keepdim=True) if lse is None else lse)


def _known_rows(
    layer: Layer, tile: Tile, heads_t: slice, masked: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The tile's log-sum-exp of student and teacher where it is known, in base 2, [b, h, n, 1].

    A row without keys has to be the same on both sides, so with masks the rows of both must be known, or none is used.
    """
    if masked and (layer.lse_s is None or layer.lse_t is None):
        return None, None
    known = []
    for lse, heads in ((layer.lse_s, tile.heads), (layer.lse_t, heads_t)):
        if lse is not None:
            lse = lse[tile.samples, heads, tile.queries, None].to(dtype) * LOG2E
            lse = torch.where(lse.isfinite(), lse, FORBIDDEN) if masked else lse
        known.append(lse)
    return known[0], known[1]


def _attends(layer: Layer, options: Options, tile: Tile) -> Tensor | None:
    """Which query attends to which key, broadcastable to the tile; None when all do."""
    device = layer.q_s.device
    o_key = torch.arange(tile.keys, device=device)
    rules = []
    if options.causal:
        rules.append(o_key <= torch.arange(tile.queries.start, tile.queries.stop, device=device)[:, None])
    if layer.key_lengths is not None:
        rules.append(o_key < layer.key_lengths[tile.samples, None, None, None])
    if layer.mask is not None:
        mask = _mask_tile(layer.mask, tile)
        rules.append(mask > torch.finfo(mask.dtype).min if mask.is_floating_point() else mask)
    if not rules:
        return None
    attends = rules[0]
    for rule in rules[1:]:
        attends = attends & rule
    return attends.expand((1,) * (4 - attends.dim()) + attends.shape)


def _bias(layer: Layer, tile: Tile, dtype: torch.dtype) -> Tensor | None:
    if layer.mask is None or not layer.mask.is_floating_point():
        return None
    return _mask_tile(layer.mask, tile).to(dtype) * LOG2E


def _mask_tile(mask: Tensor, tile: Tile) -> Tensor:
    for dim, part in enumerate((tile.samples, tile.heads, tile.queries, slice(0, tile.keys))):
        if mask.shape[dim] > 1:
            mask = mask[(slice(None),) * dim + (part,)]
    return mask


def _count(attends: Tensor, kind: str, shape: Sequence[int]) -> Tensor:
    """How many terms the tile has per sample: rows that attend to anything (kl) or attended elements (mse)."""
    per_row = attends.any(-1) if kind == "kl" else attends.expand(*attends.shape[:-1], shape[-1]).sum(-1)
    return per_row.expand(shape[:3]).sum((1, 2))


def _maps_(rows: _Rows) -> Tensor:
    """Probabilities, in the memory of the scores."""
    maps = rows.scores.exp2_()
    return maps if rows.normalised else maps.div_(maps.sum(-1, keepdim=True))


def _compare_kl(student: _Rows, teacher: _Rows, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """KL = sum_j P_t (S_t - S_s) + lse_s - lse_t per row; its gradient to S_s is P_s - P_t."""
    difference = torch.sub(teacher.scores, student.scores, out=scratch.tile("difference", student.scores.shape))
    p_s, p_t = student.scores.exp2_(), teacher.scores.exp2_()
    lse_difference: Tensor | float = 0.0
    for p, rows, sign in ((p_s, student, 1.0), (p_t, teacher, -1.0)):
        if not rows.normalised:
            norm = p.sum(-1, keepdim=True)
            p.div_(norm)
            lse_difference = lse_difference + sign * norm.log2().sum((1, 2, 3))
    sums = difference.mul_(p_t).sum((1, 2, 3)) + lse_difference
    return sums * LN2, p_s.sub_(p_t)


def _compare_mse(student: _Rows, teacher: _Rows, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """sum (P_s - P_t)^2, and half of its gradient to S_s, P_s (G - sum_j G P_s) with G = P_s - P_t."""
    p_s, p_t = _maps_(student), teacher.scores.exp2_()
    if teacher.normalised:
        half_g = torch.sub(p_s, p_t, out=p_t)
    else:
        half_g = torch.addcmul(p_s, p_t, p_t.sum(-1, keepdim=True).reciprocal_(), value=-1, out=p_t)
    sums = torch.linalg.vector_norm(half_g, dim=-1).square_().sum((1, 2))
    # torch's softmax backward visits each row once.
    out = scratch.tile("product", p_s.shape)
    return sums, torch._softmax_backward_data(half_g, p_s, -1, p_s.dtype, grad_input=out)


def _compare_mean_kl(student: _Rows, teacher: _Rows, counted: Tensor | None, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """KL between head means. With w_h = P_h / sum_h P_h, dKL/dS_h = P_h sum_j (w_h mean_t) - w_h mean_t.

    The means are taken of logarithms, so that a mean that underflows keeps its finite logarithm.
    """
    heads_s = student.scores.shape[1]
    log_mean_t, _, _ = _mean_of_logs_(teacher, scratch)
    log_mean_s, share_s, total_s = _mean_of_logs_(student, scratch)
    share_s.div_(total_s)
    mean_t = log_mean_t.exp2()
    if counted is not None:
        mean_t.mul_(counted)
    sums = log_mean_t.sub_(log_mean_s).mul_(mean_t).sum((1, 2, 3)) * LN2
    pull = torch.mul(share_s, mean_t, out=scratch.tile("work", share_s.shape))
    pulled = pull.sum(-1, keepdim=True)
    return sums, share_s.mul_(log_mean_s.exp2_().mul_(heads_s)).mul_(pulled).sub_(pull)


def _mean_of_logs_(rows: _Rows, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """log2 of the mean over heads of the maps, [b, 1, n, m]; each head's part, in place of the scores; their sum."""
    log_p = rows.scores
    if not rows.normalised:
        maps = torch.exp2(log_p, out=scratch.tile("work", log_p.shape))
        log_p.sub_(maps.sum(-1, keepdim=True).log2_())
    highest = log_p.amax(1, keepdim=True)
    part = log_p.sub_(highest).exp2_()
    total = part.sum(1, keepdim=True)
    return (total / log_p.shape[1]).log2_().add_(highest), part, total


def _compare_mean_mse(
    student: _Rows, teacher: _Rows, counted: Tensor | None, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """sum (mean_h P_s - mean_h P_t)^2, and half of its gradient, of which every head gets 1 / H of that to the mean."""
    p_s = _maps_(student)
    difference = p_s.mean(1, keepdim=True).sub_(_maps_(teacher).mean(1, keepdim=True))
    if counted is not None:
        difference.mul_(counted)
    sums = difference.square().sum((1, 2, 3))
    product = torch.mul(p_s, difference, out=scratch.tile("product", p_s.shape))
    row_term = product.sum(-1, keepdim=True)
    centred = torch.sub(difference, row_term, out=product)
    return sums, p_s.mul_(centred).mul_(1 / p_s.shape[1])


def _add_gradients(grad_scores: Tensor, layer: Layer, tile: Tile, scale: float, grad_q: Tensor, grad_k: Tensor) -> None:
    """grad_q = scale dS k, and grad_k += scale dS^T q, of one tile."""
    dtype = grad_scores.dtype
    heads, group = grad_q.shape[1], grad_q.shape[1] // grad_k.shape[1]
    q = layer.q_s[tile.samples, tile.heads, tile.queries].to(dtype).flatten(0, 1)
    k = _keys_of(layer.k_s, heads, tile, tile.heads).to(dtype).flatten(0, 1)
    grad_scores = grad_scores.flatten(0, 1)
    # A tile holds several samples only with all their heads, so (b, h) is one contiguous range of both gradients.
    first = tile.samples.start * heads + tile.heads.start
    maps = range(first, first + grad_scores.shape[0])
    out_q = grad_q.flatten(0, 1)[maps.start : maps.stop, tile.queries]
    out_k = grad_k.transpose(2, 3).flatten(0, 1)[:, :, : tile.keys]
    if is_faster(q[0].numel() * k.shape[1], q, k, grad_scores):
        for map_q, found in zip(out_q, products(grad_scores, k * scale), strict=True):
            map_q.copy_(found)
        for i, found in zip(maps, products((q * scale).transpose(1, 2), grad_scores), strict=True):
            out_k[i // group].add_(found)
        return
    torch.baddbmm(out_q, grad_scores, k, beta=0, alpha=scale, out=out_q)
    if group == 1:
        out_k = out_k[maps.start : maps.stop]
        torch.baddbmm(out_k, q.transpose(1, 2), grad_scores, alpha=scale, out=out_k)
        return
    for i, q_map, scores in zip(maps, q, grad_scores, strict=True):
        out_k[i // group].addmm_(q_map.t(), scores, alpha=scale)
