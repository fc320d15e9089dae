"""Vocabulary divergence on a GPU: chunks of tokens in scratch, gradients in the forward pass.

For a chunk of tokens two matrix products make both models' logits, one kernel (`triton_rows`) turns the student's into
their gradient in place, and two more products spend that on the gradients of state and head. The products are the
vendor's, or, since those would run whether or not a gate is open, Triton's own where there is a gate
(`triton_products`).

Logits of bfloat16 states are stored in bfloat16, as eager torch has them under autocast, but with float32 sums around
them; those of float16 and float32 states in float32. In float16 the gradient of the logits is stored 2^10 times as
large, and divided again after the products: unscaled, that of a student near its teacher would underflow.

Why chunks and not recomputed tiles, counted at 2048 tokens, V = 49408 and widths 768 and 1024 in bfloat16: recomputing
in the gradients of state and head (what cut cross entropy does) takes 6656 multiply-adds for every logit instead of
3328; chunks take 14 bytes of traffic for every logit.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optima_kernels.logits.problem import Layer, Options, Solution
from optima_kernels.logits.triton_products import PADDING, GatedProducts, VendorProducts
from optima_kernels.logits.triton_rows import row_kernel
from optima_kernels.shared.dispatch import INTERPRETED

DIVERGENCE = {"forward": 0, "reverse": 1, "jsd": 2}
# What float16 gradients of logits are multiplied by, and what they are cut off at.
NARROW_SCALE, NARROW_LIMIT = 2.0**10, 60000
# Unless the caller says otherwise a chunk has a quarter of the tokens, within these bounds, or more if it takes no more
# bytes than that, but so few parts that everything stays within a tenth of what eager torch takes: for every logit of
# 16 bits 20 bytes, measured on an H200. The teacher's logits are made for a part of a chunk at a time. Measured on an
# H100, V = 49408: in parts of 256 tokens the product waits for its head to be read (518 TFLOP/s of 700), and the GPU
# for the host.
CHUNK_TOKENS, LEAST_CHUNK_BYTES = (1024, 2048), 2**26
PART_TOKENS, LEAST_PART_BYTES = 512, 2**24
TENTH_OF_EAGER = 2


def solve(layers: Sequence[Layer], options: Options, gate: Tensor | None) -> list[Solution]:
    """See `logits.problem`. No gate is read by the host."""
    with torch.cuda.device_of(layers[0].h_s):  # type: ignore[no-untyped-call]
        return [
            _solve(_dense(layer), options, None if gate is None else gate[i : i + 1]) for i, layer in enumerate(layers)
        ]


def _dense(layer: Layer) -> Layer:
    """Heads in the dtype of their states, and every tensor with the elements of a row next to each other."""
    dense: dict[str, Tensor] = {}
    for name, like in (("h_s", layer.h_s), ("w_s", layer.h_s), ("h_t", layer.h_t), ("w_t", layer.h_t)):
        x = getattr(layer, name).to(like.dtype)
        dense[name] = x if x.stride(-1) == 1 else x.contiguous()
    return layer._replace(**dense)


def _solve(layer: Layer, options: Options, gate: Tensor | None) -> Solution:
    tokens, vocabulary = len(layer.h_s), len(layer.w_s)
    columns = math.ceil(vocabulary / PADDING) * PADDING
    products = VendorProducts(layer, columns) if gate is None else GatedProducts(layer, gate)
    solution = Solution.empty(layer, options)
    share, factors = _shares(layer, options, solution.scale)
    chunk, part = chunk_tokens(layer, options, columns)
    z_s, z_t, gradient = _scratch(layer, options, (chunk, part), columns)
    values = layer.h_s.new_empty((2, tokens), dtype=torch.float32)
    biases = [_padded(bias, columns) for bias in (layer.bias_s, layer.bias_t)]

    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        size = rows.stop - start
        products.student_logits(layer.h_s[rows], z_s[:size])
        for first in range(start, rows.stop, part):
            of_part = slice(first, min(first + part, rows.stop))
            within = slice(first - start, of_part.stop - start)
            products.teacher_logits(layer.h_t[of_part], z_t[: of_part.stop - first])
            _compare(layer, options, gate, of_part, (z_s[within], z_t), biases, factors, values, gradient[within])
        d_logits = gradient[:size]
        if options.wants[0]:
            products.state(d_logits, solution.state[rows])
        if options.wants[1]:
            products.head(d_logits, _counted(layer, rows), solution.head, accumulate=start > 0)
        if options.wants[2]:
            products.bias(d_logits, solution.bias, accumulate=start > 0)
    torch.mul(values.sum(1), share, out=solution.losses)
    solution.losses[0] *= options.temperature**2
    return solution


def _counted(layer: Layer, rows: slice) -> Tensor:
    """The student's state, 0 where a token does not count: 0 times what it holds there might be NaN."""
    state = layer.h_s[rows]
    return state if layer.counts is None else state.masked_fill(~layer.counts[rows, None], 0.0)


def chunk_tokens(layer: Layer, options: Options, columns: int) -> tuple[int, int]:
    """Tokens of a chunk, and of the part of it that is compared at a time."""
    tokens = len(layer.h_s)
    of_chunk, of_part = (columns * size for size in _bytes_a_logit(layer, options))
    least_part = max(PART_TOKENS, LEAST_PART_BYTES // of_part)
    budget = options.budget_bytes
    if budget is None:
        most = max(min(max(tokens // 4, CHUNK_TOKENS[0]), CHUNK_TOKENS[1]), LEAST_CHUNK_BYTES // of_chunk)
        left = TENTH_OF_EAGER * tokens * len(layer.w_s) - Solution.bytes_of(layer, options) - least_part * of_part
        most = max(min(most, left // of_chunk) // least_part, 1) * least_part
    else:
        most = (budget - least_part * of_part) // of_chunk
        if most < least_part:
            most = budget // (of_chunk + of_part)
    chunk = _even(tokens, max(most, 1))
    part = min(chunk, least_part)
    return (chunk, part) if any(options.wants) else (part, part)  # for values alone nothing is kept of a whole chunk


def _even(tokens: int, most: int) -> int:
    """At most `most`, in multiples of a part, so that the last chunk is not much smaller than the others."""
    even = math.ceil(tokens / math.ceil(tokens / most))
    return min(math.ceil(even / PART_TOKENS) * PART_TOKENS, most, tokens)


def _bytes_a_logit(layer: Layer, options: Options) -> tuple[int, int]:
    """Of the student's, with the gradient where that cannot lie in its place, and of the teacher's."""
    of_student, of_teacher = (_stored(h.dtype).itemsize for h in (layer.h_s, layer.h_t))
    return of_student + (layer.h_s.dtype.itemsize if _is_apart(layer, options) else 0), of_teacher


def _is_apart(layer: Layer, options: Options) -> bool:
    """Whether the gradient of the logits has another dtype than they, that of the operands of a product."""
    return any(options.wants) and _stored(layer.h_s.dtype) != layer.h_s.dtype


def _stored(dtype: torch.dtype) -> torch.dtype:
    """What the logits of states of that dtype are stored in."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _scratch(layer: Layer, options: Options, tokens: tuple[int, int], columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The student's logits of a chunk, the teacher's of a part of it, and the gradient of the student's: in their
    place, if its dtype is theirs."""
    z_s, z_t = (
        h.new_empty((size, columns), dtype=_stored(h.dtype))
        for h, size in zip((layer.h_s, layer.h_t), tokens, strict=True)
    )
    return z_s, z_t, layer.h_s.new_empty((tokens[0], columns)) if _is_apart(layer, options) else z_s


def _padded(bias: Tensor | None, columns: int) -> Tensor | None:
    if bias is None:
        return None
    padded = bias.new_zeros(columns, dtype=torch.float32)
    padded[: len(bias)] = bias
    return padded


def _shares(layer: Layer, options: Options, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a value counts in the mean of divergence and cross entropy, [2]; and with labels, what the gradients of both
    are to be multiplied by in a row, in float16 the larger of them by 1. Sets `scale` to what they lack then."""
    tokens = len(layer.h_s)
    share = scale.new_zeros(2)
    if layer.counts is None:
        share[0].fill_(1.0 / tokens)  # an assignment would copy from the host, and wait
    else:
        share[0] = layer.counts.sum().clamp(min=1).reciprocal()
    unscaled = 1.0 / NARROW_SCALE if layer.h_s.dtype == torch.float16 else 1.0
    if layer.labels is None:
        if _shared_evenly(layer):
            scale.fill_(1.0)
        else:
            torch.mul(share[0], options.temperature * unscaled, out=scale)
        return share, None
    share[1] = (layer.labels >= 0).sum().clamp(min=1).reciprocal()
    factors = share.clone()
    factors[0] *= options.temperature
    if layer.factors is None:
        factors[1] *= options.label_weight
    else:
        factors *= layer.factors
    if unscaled == 1.0:
        scale.fill_(1.0)
        return share, factors
    torch.mul(factors.abs().amax(), unscaled, out=scale)
    return share, factors / torch.where(scale == 0, 1, scale / unscaled)


def _shared_evenly(layer: Layer) -> bool:
    """Whether every row counts as much as any other, by a number that the host knows and the stored dtype can bear."""
    return layer.counts is None and layer.labels is None and layer.h_s.dtype != torch.float16


def _compare(
    layer: Layer,
    options: Options,
    gate: Tensor | None,
    rows: slice,
    logits: tuple[Tensor, Tensor],
    biases: Sequence[Tensor | None],
    factors: Tensor | None,
    values: Tensor,
    gradient: Tensor,
) -> None:
    """Launches `row_kernel` on a chunk."""
    (z_s, z_t), (bias_s, bias_t), labels = logits, biases, layer.labels
    vocabulary, columns, narrow = len(layer.w_s), z_s.shape[1], gradient.dtype == torch.float16
    row_kernel[(rows.stop - rows.start,)](
        z_s=z_s,
        z_t=z_t,
        bias_s=bias_s,
        bias_t=bias_t,
        counts=None if layer.counts is None else layer.counts[rows].view(torch.uint8),
        labels=None if labels is None else labels[rows],
        factors=factors,
        gate=gate,
        values=values[:, rows],
        gradient=gradient,
        inverse_temperature=1.0 / options.temperature,
        beta=options.beta,
        part=NARROW_SCALE if narrow else options.temperature / values.shape[1] if _shared_evenly(layer) else 1.0,
        T=values.shape[1],
        V=vocabulary,
        S=columns,
        GATED=gate is not None,
        KIND=DIVERGENCE[options.divergence],
        BIASED_S=bias_s is not None,
        BIASED_T=bias_t is not None,
        COUNTED=layer.counts is not None,
        LABELS=labels is not None,
        PLAIN=labels is not None and options.temperature != 1.0,
        GRADIENT=any(options.wants),
        LIMIT=NARROW_LIMIT if narrow else 0,
        **_walk(columns, z_s.dtype, labels is not None or options.divergence != "forward"),
    )


def _walk(columns: int, dtype: torch.dtype, is_long: bool) -> dict[str, Any]:
    """How a program walks a row: 16 bytes a thread and load, or less where the arithmetic takes many registers, and two
    tiles ahead. Unless it is told how many registers it may take, ptxas spills a few bytes to save some."""
    each, registers = (4, 128) if is_long else (16 // dtype.itemsize, 80)
    lanes = 1 << (columns - 1).bit_length()
    if INTERPRETED:
        return {"BC": max(lanes // 8, 64), "STAGES": 1}  # small vocabularies have several tiles, too
    lanes = min(lanes, 8 * 32 * each)
    limit = {} if torch.version.hip else {"maxnreg": registers}
    return {"BC": lanes, "STAGES": 3, "num_warps": max(lanes // (32 * each), 1), **limit}
