"""Attention-map loss over tiles of queries: two score tiles live at a time, never a map.

A tile is a few heads, some queries and all keys they may attend to, so a row's softmax needs no online rescaling. The
loss and both gradients come out of one visit to the tile, while its scores are still in the cache: four matrix
products (two of scores, two of gradients) where recomputing the scores in a separate backward would need six. What is
kept for backward is the gradients themselves, of the size of q and k, and not one teacher tensor.

Everything element-wise is in place, in base-2 logarithms: log2(e) rides for free in the matrix product's scale, and
torch's exp2 was measured three times as fast as its exp on AVX-512.

Known log-sum-exp rows are not used here. They would save one row maximum and one row sum of the eleven passes over a
tile, about 4 % of the time.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optima_kernels.attention_problem import MapLayer, MapOptions, MapSums, empty_gradients
from optima_kernels.dispatch import compute_dtype

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# Scores per tile. On CPU three tiles of 2^20 floats stay in a shared L3 cache; smaller tiles pay more for each torch
# call, larger ones go to memory. On a GPU a tile has to fill the device.
TILE_ELEMENTS = {"cpu": 1 << 20}
TILE_ELEMENTS_OTHERWISE = 1 << 24

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


def attention_map_sums(layers: Sequence[MapLayer], options: MapOptions, with_grad: bool) -> list[MapSums]:
    """Sums, counts and gradients of every layer, one layer after the other."""
    with torch.no_grad(), torch.autocast(layers[0].q_s.device.type, enabled=False):
        return [_layer_sums(layer, options, with_grad) for layer in layers]


def _layer_sums(layer: MapLayer, options: MapOptions, with_grad: bool) -> MapSums:
    q_s, k_s, q_t, k_t = layer[:4]
    dtype = compute_dtype(q_s, k_s, q_t, k_t)
    batch = q_s.shape[0]
    total = q_s.new_zeros(batch, dtype=dtype)
    count = q_s.new_zeros(batch, dtype=dtype)
    # A product that writes whole rows of M keys was measured a quarter faster than one that writes rows of d.
    grad_q, grad_k = empty_gradients(layer, keys_last=True) if with_grad else (None, None)
    if grad_k is not None:
        grad_k.zero_()
    scratch = Scratch(q_s.device, dtype)
    compare = _compare_kl if options.kind == "kl" else _compare_mse
    compare_means = _compare_mean_kl if options.kind == "kl" else _compare_mean_mse
    for tile in _tiles(layer, options):
        b, h_s, h_t = tile.samples, tile.heads, slice(None) if options.mean_heads else tile.heads
        q, k = q_s[b, h_s, tile.queries].to(dtype), k_s[b, h_s, : tile.keys].to(dtype)
        scores_s = _scores(q, k, layer.scale_s * LOG2E, scratch.tile("student", (*q.shape[:3], tile.keys)))
        q, k = q_t[b, h_t, tile.queries].to(dtype), k_t[b, h_t, : tile.keys].to(dtype)
        scores_t = _scores(q, k, layer.scale_t * LOG2E, scratch.tile("teacher", (*q.shape[:3], tile.keys)))
        attends = _attends(layer, options, tile)
        _mask_scores(scores_s, scores_t, attends, _bias(layer, tile, dtype))
        if options.mean_heads:
            rows = None if attends is None else attends.any(-1, keepdim=True)
            sums, grad_scores = compare_means(scores_s, scores_t, rows, scratch)
        else:
            sums, grad_scores = compare(scores_s, scores_t, scratch)
        total[b] += sums
        maps = 1 if options.mean_heads else scores_s.shape[1]
        count[b] += _count(attends, options.kind, (scores_s.shape[0], maps, *scores_s.shape[2:]))
        if grad_q is not None and grad_k is not None:
            _add_gradients(grad_scores, layer, tile, grad_q, grad_k)
    return MapSums(total, count, grad_q, grad_k)


class Scratch:
    """Buffers that every tile reuses, because fresh memory of this size costs a page fault per 4 KiB."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.buffers: dict[str, Tensor] = {}

    def tile(self, name: str, shape: Sequence[int]) -> Tensor:
        """An uninitialised contiguous tensor; a second one of the same name overwrites the first."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, device=self.device, dtype=self.dtype)
        return self.buffers[name][:size].view(tuple(shape))


def _tiles(layer: MapLayer, options: MapOptions) -> Iterator[Tile]:
    batch, heads, queries, _ = layer.q_s.shape
    keys = layer.k_s.shape[2]
    budget = TILE_ELEMENTS.get(layer.q_s.device.type, TILE_ELEMENTS_OTHERWISE)
    heads_at_once = max(heads, layer.q_t.shape[1]) if options.mean_heads else 1
    query_step = _even_step(queries, budget // (heads_at_once * keys))
    head_step = heads if options.mean_heads else _even_step(heads, budget // (query_step * keys))
    whole_samples = budget // (max(heads_at_once, heads) * query_step * keys) if head_step == heads else 1
    sample_step = _even_step(batch, whole_samples)
    for b in range(0, batch, sample_step):
        for h in range(0, heads, head_step):
            for i in range(0, queries, query_step):
                end = min(i + query_step, queries)
                attended = min(keys, end) if options.causal else keys
                yield Tile(slice(b, b + sample_step), slice(h, h + head_step), slice(i, end), attended)


def _even_step(length: int, most: int) -> int:
    """The step that cuts `length` into as few parts as `most` allows, all of about one size."""
    parts = -(-length // max(1, most))
    return -(-length // parts)


def _scores(q: Tensor, k: Tensor, scale: float, out: Tensor) -> Tensor:
    q, k, flat = q.flatten(0, 1), k.flatten(0, 1), out.flatten(0, 1)
    torch.baddbmm(flat, q, k.transpose(1, 2), beta=0, alpha=scale, out=flat)
    return out


def _attends(layer: MapLayer, options: MapOptions, tile: Tile) -> Tensor | None:
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


def _bias(layer: MapLayer, tile: Tile, dtype: torch.dtype) -> Tensor | None:
    if layer.mask is None or not layer.mask.is_floating_point():
        return None
    return _mask_tile(layer.mask, tile).to(dtype) * LOG2E


def _mask_tile(mask: Tensor, tile: Tile) -> Tensor:
    for dim, part in enumerate((tile.samples, tile.heads, tile.queries, slice(0, tile.keys))):
        if mask.shape[dim] > 1:
            mask = mask[(slice(None),) * dim + (part,)]
    return mask


def _mask_scores(scores_s: Tensor, scores_t: Tensor, attends: Tensor | None, bias: Tensor | None) -> None:
    if attends is None:
        return
    forbidden = ~attends
    for scores in (scores_s, scores_t):
        if bias is not None:
            scores.add_(bias)
        scores.masked_fill_(forbidden, FORBIDDEN)


def _count(attends: Tensor | None, kind: str, shape: Sequence[int]) -> Tensor | int:
    """How many terms the tile has per sample: rows that attend to anything (kl) or attended elements (mse)."""
    if attends is None:
        return math.prod(shape[1:3]) if kind == "kl" else math.prod(shape[1:])
    per_row = attends.any(-1) if kind == "kl" else attends.expand(*attends.shape[:-1], shape[-1]).sum(-1)
    return per_row.expand(shape[:3]).sum((1, 2))


def _softmax2_(scores: Tensor) -> Tensor:
    """Turn base-2 scores into probabilities in place."""
    scores.sub_(scores.amax(-1, keepdim=True)).exp2_()
    return scores.div_(scores.sum(-1, keepdim=True))


def _compare_kl(scores_s: Tensor, scores_t: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """KL = sum_j P_t (S_t - S_s) + lse_s - lse_t per row; its gradient to S_s is P_s - P_t."""
    shifted_s = scores_s.sub_(scores_s.amax(-1, keepdim=True))
    shifted_t = scores_t.sub_(scores_t.amax(-1, keepdim=True))
    difference = torch.sub(shifted_t, shifted_s, out=scratch.tile("difference", scores_s.shape))
    p_s, p_t = shifted_s.exp2_(), shifted_t.exp2_()
    norm_s, norm_t = p_s.sum(-1, keepdim=True), p_t.sum(-1, keepdim=True)
    p_s.div_(norm_s)
    p_t.div_(norm_t)
    sums = difference.mul_(p_t).sum((1, 2, 3)) + (norm_s.log2() - norm_t.log2()).sum((1, 2, 3))
    return sums * LN2, p_s.sub_(p_t)


def _compare_mse(scores_s: Tensor, scores_t: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """sum (P_s - P_t)^2; its gradient to S_s is P_s (G - sum_j G P_s) with G = 2 (P_s - P_t)."""
    p_s, p_t = _softmax2_(scores_s), _softmax2_(scores_t)
    half_g = torch.sub(p_s, p_t, out=p_t)
    product = torch.mul(half_g, half_g, out=scratch.tile("product", p_s.shape))
    sums = product.sum((1, 2, 3))
    row_term = torch.mul(half_g, p_s, out=product).sum(-1, keepdim=True)
    return sums, half_g.sub_(row_term).mul_(p_s).mul_(2)


def _compare_mean_kl(
    scores_s: Tensor, scores_t: Tensor, rows: Tensor | None, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """KL between head means. With w_h = P_h / sum_h P_h, dKL/dS_h = P_h sum_j (w_h mean_t) - w_h mean_t.

    The means are taken of logarithms, so that a mean that underflows keeps its finite logarithm.
    """
    heads_s = scores_s.shape[1]
    log_mean_t, _ = _mean_of_logs_(scores_t)
    log_mean_s, share_s = _mean_of_logs_(scores_s)
    mean_t = log_mean_t.exp2()
    if rows is not None:
        mean_t.mul_(rows)
    sums = log_mean_t.sub_(log_mean_s).mul_(mean_t).sum((1, 2, 3)) * LN2
    pull = torch.mul(share_s, mean_t, out=scratch.tile("pull", share_s.shape))
    pulled = pull.sum(-1, keepdim=True)
    return sums, share_s.mul_(log_mean_s.exp2_().mul_(heads_s)).mul_(pulled).sub_(pull)


def _mean_of_logs_(scores: Tensor) -> tuple[Tensor, Tensor]:
    """log2 of the mean over heads of the maps, [b, 1, n, m], and each head's share of it (in place of the scores)."""
    log_p = scores.sub_(scores.amax(-1, keepdim=True))
    log_p.sub_(log_p.exp2().sum(-1, keepdim=True).log2_())
    highest = log_p.amax(1, keepdim=True)
    share = log_p.sub_(highest).exp2_()
    total = share.sum(1, keepdim=True)
    share.div_(total)
    return total.div_(scores.shape[1]).log2_().add_(highest), share


def _compare_mean_mse(
    scores_s: Tensor, scores_t: Tensor, rows: Tensor | None, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """sum (mean_h P_s - mean_h P_t)^2, whose gradient reaches every head as 1 / H of that to the mean."""
    p_s = _softmax2_(scores_s)
    difference = p_s.mean(1, keepdim=True).sub_(_softmax2_(scores_t).mean(1, keepdim=True))
    if rows is not None:
        difference.mul_(rows)
    sums = difference.square().sum((1, 2, 3))
    product = torch.mul(p_s, difference, out=scratch.tile("product", p_s.shape))
    row_term = product.sum(-1, keepdim=True)
    centred = torch.sub(difference, row_term, out=product)
    return sums, p_s.mul_(centred).mul_(2 / p_s.shape[1])


def _add_gradients(grad_scores: Tensor, layer: MapLayer, tile: Tile, grad_q: Tensor, grad_k: Tensor) -> None:
    """grad_q = scale dS k, and grad_k += scale dS^T q, of one tile."""
    dtype = grad_scores.dtype
    q = layer.q_s[tile.samples, tile.heads, tile.queries].to(dtype).flatten(0, 1)
    k = layer.k_s[tile.samples, tile.heads, : tile.keys].to(dtype).flatten(0, 1)
    grad_scores = grad_scores.flatten(0, 1)
    # A tile holds several samples only with all their heads, so (b, h) is one contiguous range of both gradients.
    first = tile.samples.start * grad_q.shape[1] + tile.heads.start
    group = slice(first, first + grad_scores.shape[0])
    out_q = grad_q.flatten(0, 1)[group, tile.queries]
    torch.baddbmm(out_q, grad_scores, k, beta=0, alpha=layer.scale_s, out=out_q)
    out_k = grad_k.transpose(2, 3).flatten(0, 1)[group, :, : tile.keys]
    torch.baddbmm(out_k, q.transpose(1, 2), grad_scores, alpha=layer.scale_s, out=out_k)
