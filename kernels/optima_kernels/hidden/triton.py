"""Hidden-state loss on a GPU: three matrix products around one kernel that passes over rows.

The projected state is made by a matrix product. `row_kernel` then does all that is not a product, in the memory of the
projected state: it adds the bias, normalises, subtracts the teacher, sums the loss, and leaves the gradient, whose
column sums are that of the bias. Two more products turn it into the gradients of state and weight, and it is freed
before the forward pass returns. Products are the vendor's, or, since those run whether or not a gate is open, those of
`triton_products` where there is a gate. Without a projection `row_kernel` alone does it: both states are read once, the
gradient is written once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from optima_kernels.hidden.problem import L2_EPS, LAYERNORM_EPS, NARROW, Layer, Options, Solution
from optima_kernels.hidden.triton_products import multiply_into, project, state_gradients, tiling, weight_gradients
from optima_kernels.hidden.triton_rows import join_rows_kernel, row_kernel, wide_row_kernel
from optima_kernels.shared.pointers import MOST_LAYERS_PER_LAUNCH
from optima_kernels.shared.target import target_of

NORMALIZE = {None: 0, "layernorm": 1, "l2": 2}

# Rows of more features do not fit into registers twice.
WIDEST_ROW = 8192
WIDE_COLUMNS = 4096
# A program takes rows one after another, for few shares of column sums, but leaves enough programs to fill a chip.
MOST_TURNS = 16
FULL = 660
JOINED_PROGRAMS, JOINED_COLUMNS = 32, 32


def solve(layers: Sequence[Layer], options: Options, gate: Tensor | None) -> list[Solution]:
    """Loss and gradients of every layer, layers that look alike in one launch a kernel. A closed gate gives zeros."""
    solutions: dict[int, Solution] = {}
    with torch.cuda.device_of(layers[0].h_s):  # type: ignore[no-untyped-call]
        for members in _alike(layers):
            gates = gate
            if gate is not None and len(members) < len(layers):
                gates = torch.stack([gate[i] for i in members])
            solutions |= zip(members, _solve([_dense(layers[i]) for i in members], options, gates), strict=True)
    return [solutions[i] for i in range(len(layers))]


def _dense(layer: Layer) -> Layer:
    """Every tensor with the elements of a row next to each other, and the operands of products of one dtype."""
    dense = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in layer[:5]]
    if dense[2] is not None:
        dense[2] = dense[2].to(layer.h_s.dtype)
    return Layer._make((*dense, layer.wants, layer.weight_dtype))


def _alike(layers: Sequence[Layer]) -> Iterator[list[int]]:
    """Indices of layers that one launch can serve."""
    groups: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        key = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in layer[:5])
        groups.setdefault((key, layer.wants), []).append(i)
    for members in groups.values():
        for first in range(0, len(members), MOST_LAYERS_PER_LAUNCH):
            yield members[first : first + MOST_LAYERS_PER_LAUNCH]


def _solve(layers: Sequence[Layer], options: Options, gate: Tensor | None) -> list[Solution]:
    """Of layers that look alike."""
    first, (wants_state, wants_weight, wants_bias) = layers[0], layers[0].wants
    h_s = [x.h_s for x in layers]
    states = [x.new_empty(x.shape if wants_state else 0) for x in h_s]
    if first.weight is None:
        losses, _ = _rows(layers, h_s, states, options, gate)
        return [
            Solution(loss, state, *(state.new_empty(0, dtype=torch.float32) for _ in range(2)))
            for loss, state in zip(losses, states, strict=True)
        ]

    shape = first.weight.shape if wants_weight else 0
    weights = [x.h_s.new_empty(shape, dtype=x.weight_dtype) for x in layers]
    weight = [x.weight for x in layers if x.weight is not None]
    token_weight = [x.token_weight for x in layers if x.token_weight is not None]
    projected = first.h_s.new_empty((len(layers), *first.h_t.shape)).unbind()
    rows = (*first.weight.shape, first.h_s.stride(0), first.weight.stride(0))
    aligned = all(length % 8 == 0 for length in rows)
    tile = tiling(target_of(first.h_s.device), first.h_s.dtype != torch.float32, aligned)
    if gate is None:
        if token_weight:  # what does not count may be anything, and a product with 0 would not end that
            h_s = [x.masked_fill(counts[:, None] == 0, 0.0) for x, counts in zip(h_s, token_weight, strict=True)]
        for out, x, w in zip(projected, h_s, weight, strict=True):
            multiply_into(out, x, w.t())
    else:
        project(h_s, weight, projected, gate, tile)

    losses, biases = _rows(layers, projected, projected, options, gate)

    if gate is not None:
        if wants_state:
            state_gradients(projected, weight, states, gate, tile)
        if wants_weight:
            weight_gradients(projected, h_s, token_weight or None, weights, gate, tile)
    else:
        for i, g in enumerate(projected):
            if wants_state:
                multiply_into(states[i], g, weight[i])
            if wants_weight:
                multiply_into(weights[i], g.t(), h_s[i])
    if not wants_bias:
        biases = [x.new_empty(0, dtype=torch.float32) for x in h_s]
    return [Solution(*x) for x in zip(losses, states, weights, biases, strict=True)]


def _rows(
    layers: Sequence[Layer],
    x: Sequence[Tensor],
    gradient: Sequence[Tensor],
    options: Options,
    gate: Tensor | None,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The losses of rows x [T, D] a layer and the gradients of the biases; `gradient`, which may be x, is filled."""
    first, count = layers[0], len(layers)
    tokens, width = first.h_t.shape
    kind = NORMALIZE[options.normalize]
    weighted, biased, is_projected = first.token_weight is not None, first.bias is not None, first.weight is not None
    sums = first.wants[2]
    arguments: dict[str, Any] = {
        "x": tuple(x),
        "bias": tuple(layer.bias for layer in layers) if biased else None,
        "h_t": tuple(layer.h_t for layer in layers),
        "token_weight": tuple(layer.token_weight for layer in layers) if weighted else None,
        "gate": gate,
        "gradient": tuple(gradient),
        "T": tokens,
        "D": width,
        "factor": None if first.factor == 1 else first.factor,
        "s_x": x[0].stride(0),
        "s_h_t": first.h_t.stride(0),
        "LAYERS": count,
        "GATED": gate is not None,
        "WEIGHTED": weighted,
        "BIASED": biased,
        "KIND": kind,
        "EPS": L2_EPS if kind == 2 else LAYERNORM_EPS,
        "STORE": any(first.wants),
    }
    if width > WIDEST_ROW:
        shares = first.h_s.new_empty((count, tokens), dtype=torch.float32)
        owes = sums or (first.wants[0] and not is_projected)
        wide_row_kernel[(tokens, count)](loss=shares, OWES=owes, BC=WIDE_COLUMNS, num_warps=8, **arguments)
        return _finished(shares, None, layers, gate), [g.sum(0, dtype=torch.float32) for g in gradient] if sums else []

    tile = row_tiling(width, x[0].dtype != torch.float32)
    blocks = triton.cdiv(tokens, tile["BR"])
    turns = max(min(blocks * count // FULL, MOST_TURNS), 1)
    programs = triton.cdiv(blocks, turns)
    shares = first.h_s.new_empty((count, programs), dtype=torch.float32)
    column_shares = first.h_s.new_empty((count, programs, width), dtype=torch.float32) if sums else None
    row_kernel[(programs, count)](
        loss=shares,
        sums=column_shares,
        OWES=first.wants[0] and not is_projected,
        SUMS=sums,
        DOUBLE=kind != 0 and width <= NARROW,
        turns=turns,
        **tile,
        **arguments,
    )
    biases = [first.h_s.new_empty(width, dtype=torch.float32) for _ in layers] if sums else []
    return _finished(shares, column_shares, layers, gate, biases), biases


def _finished(
    shares: Tensor,
    column_shares: Tensor | None,
    layers: Sequence[Layer],
    gate: Tensor | None,
    biases: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    """The losses, of programs' shares [L, programs]; and fills `biases`, of shares [L, programs, D]."""
    count, programs = shares.shape
    width = layers[0].h_t.shape[1]
    losses = shares.new_empty(count)
    join_rows_kernel[(1 if column_shares is None else triton.cdiv(width, JOINED_COLUMNS), count)](
        shares=shares,
        column_shares=column_shares,
        losses=losses,
        biases=tuple(biases) if biases else None,
        gate=gate,
        scale=1.0 / layers[0].h_t.numel(),
        PROGRAMS=programs,
        D=width,
        LAYERS=count,
        GATED=gate is not None,
        SUMS=column_shares is not None,
        BP=JOINED_PROGRAMS,
        BC=JOINED_COLUMNS,
    )
    return losses.unbind()


def row_tiling(width: int, narrow: bool) -> dict[str, int]:
    """About 2048 elements at a time, in float64 1024: a row is held in registers whole, so that it is read once.

    `narrow` says that x has 16 bits.
    """
    columns = triton.next_power_of_2(width)
    elements = 1024 if columns <= NARROW else 2048
    # The next rows are on their way while these are worked on, where shared memory holds them.
    tile = {"num_warps": 4, "STAGES": 3 if narrow else 2} if columns <= 2048 else {"num_warps": 8, "STAGES": 1}
    return {"BR": max(elements // columns, 1), "BC": columns, **tile}
