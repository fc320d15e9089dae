"""`linear_kl` from torch calls over blocks of tokens.

Both models' logits of a block of tokens are made in two scratch buffers. A few rows at a time, still in cache, the
student's turn into the gradient of the loss in them, which two matrix products then spend on the gradients of state
and head. So the forward pass does the four products of the usual way (and no more: making the logits again in the
backward pass would add 55 % at widths 512 and 768), and it keeps nothing but those gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optima_kernels.logits.comparison import CACHED_ELEMENTS, LN2, LOG2E, compare
from optima_kernels.logits.problem import Layer, Options, Solution
from optima_kernels.shared import cpu_products
from optima_kernels.shared.gates import closed_gates
from optima_kernels.shared.scratch import Scratch
from optima_kernels.shared.tokens import token_weight

# A block of tokens has about this many logits of each model (32 MB of float32), but not fewer tokens than BLOCK_TOKENS,
# below which the products are bound by reading the heads.
BLOCK_ELEMENTS = 2**23
BLOCK_TOKENS = 256
SLICE_WORDS = 4096
# Rows of at most so many logits are compared in float64, which costs little there: in wider ones the rounding of single
# probabilities averages out.
NARROW = 512


def solve(layers: Sequence[Layer], options: Options, gate: Tensor | None) -> list[Solution]:
    """See `logits.problem`. Work behind a closed gate is saved where the host can see it: on a CPU."""
    closed = closed_gates(gate, len(layers))
    return [
        Solution.zero(layer, options) if shut else _solve(layer, options)
        for layer, shut in zip(layers, closed, strict=True)
    ]


def _solve(layer: Layer, options: Options) -> Solution:
    tokens, vocabulary, dtype, temperature = len(layer.h_s), len(layer.w_s), layer.dtype, options.temperature
    solution = Solution.empty(layer, options)
    for x in (solution.losses, solution.head, solution.bias):
        x.zero_()
    labelled = None if layer.labels is None else layer.labels >= 0
    weights = [_mean_weight(layer, counts) for counts in (layer.counts, labelled)]
    head_s, head_t = layer.w_s.to(dtype), layer.w_t.to(dtype)
    scale = LOG2E / temperature  # logits are to base 2
    bias_s, bias_t = (None if b is None else b.to(dtype) * scale for b in (layer.bias_s, layer.bias_t))
    block = block_tokens(options.budget_bytes, vocabulary, dtype, tokens)
    scratch_s, scratch_t = (layer.h_s.new_empty((block, vocabulary), dtype=dtype) for _ in range(2))

    for start in range(0, tokens, block):
        rows = slice(start, min(start + block, tokens))
        ignored = None if layer.counts is None else ~layer.counts[rows, None]
        state_s, state_t = (_counted(h[rows].to(dtype), ignored) for h in (layer.h_s, layer.h_t))
        z_s = _logits(state_s * scale, head_s, bias_s, scratch_s)
        z_t = _logits(state_t * scale, head_t, bias_t, scratch_t)
        _compare(layer, options, start, z_s, z_t, weights, solution.losses)
        if cpu_products.in_bfloat16(z_s.numel() * layer.h_s.shape[1], layer.h_s, layer.w_s):
            _spend_in_bfloat16(z_s, _counted(layer.h_s[rows], ignored), layer.w_s, solution, rows, options)
        else:
            if options.wants[0]:
                solution.state[rows] = cpu_products.product(z_s, head_s)
            if options.wants[1]:
                _add_head_gradient(z_s, state_s, solution.head)
        if options.wants[2]:
            solution.bias.add_(z_s.sum(0))
    solution.losses[0] *= temperature
    solution.losses[1] /= tokens
    solution.scale.fill_(1.0)
    return solution


def block_tokens(budget_bytes: int | None, vocabulary: int, dtype: torch.dtype, tokens: int) -> int:
    if budget_bytes is None:
        block = max(BLOCK_ELEMENTS // vocabulary, BLOCK_TOKENS)
    else:
        block = budget_bytes // (2 * vocabulary * dtype.itemsize)
    return max(min(block, tokens), 1)


def _counted(state: Tensor, ignored: Tensor | None) -> Tensor:
    return state if ignored is None else state.masked_fill(ignored, 0.0)


def _mean_weight(layer: Layer, counts: Tensor | None) -> Tensor:
    """What each token counts, of mean 1."""
    weight = token_weight(layer.h_s.shape[:1], counts, None, layer.dtype)
    return layer.h_s.new_ones(len(layer.h_s), dtype=layer.dtype) if weight is None else weight


def _compare(
    layer: Layer, options: Options, start: int, z_s: Tensor, z_t: Tensor, weights: Sequence[Tensor], sums: Tensor
) -> None:
    """Adds a block's values to `sums`, and turns `z_s` into their gradient; logits are over temperature, to base 2."""
    (rows, vocabulary), dtype, temperature = z_s.shape, z_s.dtype, options.temperature
    tokens = len(layer.h_s)
    cached = max(CACHED_ELEMENTS // vocabulary, 1)
    wide = torch.float64 if vocabulary <= NARROW else dtype
    scratch, of_labels = Scratch(z_s.device, wide), Scratch(z_s.device, dtype)
    factors = (1.0, options.label_weight) if layer.factors is None else layer.factors.unbind()

    for first in range(0, rows, cached):
        part = slice(first, min(first + cached, rows))
        of_all = slice(start + part.start, start + part.stop)
        weight, label_weight = (of_tokens[of_all] for of_tokens in weights)
        x = scratch.tile("logits", (2, *z_s[part].shape))
        for x_of, z in zip(x, (z_s[part].to(wide), z_t[part].to(wide)), strict=True):
            torch.sub(z, z.amax(-1, keepdim=True), out=x_of)
        in_place = z_s[part] if layer.labels is None and wide == dtype else None
        weight = (weight * (temperature / tokens)).to(wide)
        value, gradient = compare(x, weight, options.divergence, options.beta, scratch, in_place)
        sums[0] += value.sum()
        if layer.labels is None:
            if in_place is None:
                z_s[part] = gradient
            continue
        labels = layer.labels[of_all].clamp(min=0)[:, None]
        losses, p = _cross_entropy(z_s[part], labels, temperature, of_labels)
        sums[1] += losses.dot(label_weight)
        label_weight = (label_weight * (factors[1] / tokens))[:, None]
        p.mul_(label_weight).scatter_add_(1, labels, -label_weight)
        torch.add(p, gradient.to(dtype).mul_(factors[0]), out=z_s[part])


def _cross_entropy(z: Tensor, labels: Tensor, temperature: float, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """A value a row [R], and the probabilities [R, V] at temperature 1, of logits as `_compare` takes them."""
    x = torch.sub(z, z.amax(-1, keepdim=True), out=scratch.tile("logits", z.shape)).mul_(temperature)
    of_label = x.gather(1, labels)
    p = x.exp2_()
    total = p.sum(-1, keepdim=True)
    losses = total.log2().sub_(of_label).mul_(LN2)[:, 0]
    return losses, p.div_(total)


def _logits(state: Tensor, head: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    z = scratch[: len(state)]
    if cpu_products.is_faster(state.numel() * len(head), state, head):
        for words in _slices(len(head)):
            z[:, words] = cpu_products.product(state, head[words].t())
    else:
        torch.mm(state, head.t(), out=z)
    return z if bias is None else z.add_(bias)


def _add_head_gradient(d_logits: Tensor, state: Tensor, out: Tensor) -> None:
    """out [V, D] += d_logits^T [V, T] state [T, D]."""
    if cpu_products.is_faster(state.numel() * len(out), d_logits, state, out):
        for words in _slices(len(out)):
            out[words] += cpu_products.product(d_logits[:, words].t(), state)
    else:
        out.addmm_(d_logits.t(), state)


def _spend_in_bfloat16(
    d_logits: Tensor, state: Tensor, head: Tensor, solution: Solution, rows: slice, options: Options
) -> None:
    """The gradients of state and head by products of bfloat16, a slice of words at a time, summed in float32."""
    of_state = torch.zeros_like(state, dtype=d_logits.dtype)
    for words in _slices(len(head)):
        narrow = d_logits[:, words].to(state.dtype)
        if options.wants[0]:
            of_state += narrow @ head[words]
        if options.wants[1]:
            solution.head[words] += narrow.t() @ state
    if options.wants[0]:
        solution.state[rows] = of_state


def _slices(vocabulary: int) -> list[slice]:
    """Some products come in fresh memory: of so many words at a time it stays in the cache."""
    return [slice(start, start + SLICE_WORDS) for start in range(0, vocabulary, SLICE_WORDS)]
