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
import triton
from torch import Tensor

from optima_kernels.logits.problem import Layer, Options, Solution
from optima_kernels.logits.triton_products import GatedProducts, VendorProducts
from optima_kernels.logits.triton_rows import row_kernel

# Rows of logits are padded to a multiple of this many columns, for aligned rows of any vocabulary.
PADDING = 64
# Chunks have a multiple of so many tokens, where they have that many: the rows of a tile of the products.
ALIGNED = 128
DIVERGENCE = {"forward": 0, "reverse": 1, "jsd": 2}
# What float16 gradients of logits are multiplied by, and what they are cut off at.
NARROW_SCALE, NARROW_LIMIT = 2.0**10, 60000
# Logits of both models in a chunk, unless the caller says otherwise.
BUDGET_BYTES = 2**28


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
    products = VendorProducts() if gate is None else GatedProducts(gate, layer.h_s.device)
    solution = Solution.empty(layer, options)
    share, factors = _shares(layer, options, solution.scale)
    columns = triton.cdiv(vocabulary, PADDING) * PADDING
    chunk = chunk_tokens(layer, options, columns)
    z_s, z_t, gradient = _scratch(layer, options, chunk, columns)
    values = layer.h_s.new_empty((2, tokens), dtype=torch.float32)
    biases = [_padded(bias, columns) for bias in (layer.bias_s, layer.bias_t)]

    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        size = rows.stop - start
        products.logits(layer.h_s[rows], layer.w_s, z_s[:size])
        products.logits(layer.h_t[rows], layer.w_t, z_t[:size])
        _compare(layer, options, gate, rows, (z_s, z_t), biases, factors, values, gradient)
        d_logits = gradient[:size]
        if options.wants[0]:
            products.state(d_logits, layer.w_s, solution.state[rows])
        if options.wants[1]:
            state = layer.h_s[rows]
            if layer.counts is not None:
                state = state.masked_fill(~layer.counts[rows, None], 0.0)
            products.head(d_logits, state, solution.head, accumulate=start > 0)
        if options.wants[2]:
            products.bias(d_logits, solution.bias, accumulate=start > 0)
    torch.mul(values.sum(1), share, out=solution.losses)
    solution.losses[0] *= options.temperature**2
    return solution


def chunk_tokens(layer: Layer, options: Options, columns: int) -> int:
    """As many tokens as the budget allows, in chunks of about the same size."""
    tokens = len(layer.h_s)
    budget = BUDGET_BYTES if options.budget_bytes is None else options.budget_bytes
    most = max(budget // (columns * sum(_bytes_a_logit(layer, options))), 1)
    chunks = math.ceil(tokens / most)
    return min(math.ceil(tokens / chunks / ALIGNED) * ALIGNED, most, tokens)


def _bytes_a_logit(layer: Layer, options: Options) -> tuple[int, int, int]:
    """Of the student's logits, the teacher's, and the gradient where it cannot lie in the student's."""
    of_student, of_teacher = (_stored(h.dtype).itemsize for h in (layer.h_s, layer.h_t))
    apart = any(options.wants) and _stored(layer.h_s.dtype) != layer.h_s.dtype
    return of_student, of_teacher, layer.h_s.dtype.itemsize if apart else 0


def _stored(dtype: torch.dtype) -> torch.dtype:
    """What the logits of states of that dtype are stored in."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _scratch(layer: Layer, options: Options, chunk: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, teacher's, and the gradient in the student's: in their place, if its dtype is theirs."""
    z_s, z_t = (h.new_empty((chunk, columns), dtype=_stored(h.dtype)) for h in (layer.h_s, layer.h_t))
    apart = _bytes_a_logit(layer, options)[2] > 0
    return z_s, z_t, layer.h_s.new_empty((chunk, columns)) if apart else z_s


def _padded(bias: Tensor | None, columns: int) -> Tensor | None:
    if bias is None:
        return None
    padded = bias.new_zeros(columns, dtype=torch.float32)
    padded[: len(bias)] = bias
    return padded


def _shares(layer: Layer, options: Options, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a value counts in the mean of divergence and cross entropy, [2]; and with labels, what the gradients of both
    are to be multiplied by in a row, the larger of them 1. Sets `scale` to what they lack then."""
    tokens = len(layer.h_s)
    share = scale.new_zeros(2)
    share[0] = 1.0 / tokens if layer.counts is None else layer.counts.sum().clamp(min=1).reciprocal()
    unscaled = 1.0 / NARROW_SCALE if layer.h_s.dtype == torch.float16 else 1.0
    if layer.labels is None:
        torch.mul(share[0], options.temperature * unscaled, out=scale)
        return share, None
    share[1] = (layer.labels >= 0).sum().clamp(min=1).reciprocal()
    factors = share.clone()
    factors[0] *= options.temperature
    if layer.factors is None:
        factors[1] *= options.label_weight
    else:
        factors *= layer.factors
    torch.mul(factors.abs().amax(), unscaled, out=scale)
    return share, factors / torch.where(scale == 0, 1, scale / unscaled)


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
    jsd = options.divergence == "jsd"
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
        log_beta=math.log(options.beta) if jsd else 0.0,
        log_rest=math.log1p(-options.beta) if jsd else 0.0,
        part=NARROW_SCALE if narrow else 1.0,
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
        **_walk(columns, z_s.dtype),
    )


def _walk(columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """How a program walks a row: 16 bytes a thread and load, two loads of each model at a time."""
    each = 16 // dtype.itemsize
    lanes = min(triton.next_power_of_2(columns), 8 * 32 * each)
    return {"R": 2, "BC": lanes, "num_warps": max(lanes // (32 * each), 1)}
