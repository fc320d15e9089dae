"""Hidden-state loss kernels.

With a projection, `difference_kernel` makes tiles of the projected state, subtracts the teacher, reduces, and stores
the difference once, in the dtype of the student state; the kernels of `products` turn that into gradients and it is
freed before the forward pass returns. Recomputing the difference for each of the two gradients instead would double the
products. With a normalisation, rows must be whole before they are compared: the projected state takes the place of the
difference, and `row_kernel` turns its rows, in place, into the gradient in them.

Without a projection the loss is bound by memory, and `row_kernel` alone does it: both states are read once, the
gradient is written once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optima_kernels.hidden.problem import L2_EPS, LAYERNORM_EPS, NARROW, HiddenLayer, HiddenTensors, Solution
from optima_kernels.shared.dispatch import INTERPRETED
from optima_kernels.shared.products import (
    is_closed,
    load_tile,
    of_layer,
    project_tile,
    state_kernel,
    store_tile,
    tiling,
    weight_kernel,
)
from optima_kernels.shared.target import target_of

# A kernel's arguments are at most 4 KiB; a layer takes up to six pointers.
MOST_LAYERS_PER_LAUNCH = 32
NORMALIZE = {None: 0, "layernorm": 1, "l2": 2}


@triton.jit
def difference_kernel(
    h_s, h_t, weight, bias, token_weight, gate, difference, loss, T, D_T, D_S, s_h_s, s_h_t, s_weight,
    LAYERS: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, COMPARE: tl.constexpr,
    STORE: tl.constexpr, WIDEN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """difference [T, D_T] = token_weight * (h_s weight^T + bias - h_t), and each tile's share of the loss
    of every token; or, without COMPARE, the projected state alone."""
    i_l, i_p = tl.program_id(1), tl.program_id(0)
    tiles = tl.cdiv(D_T, BC)
    o_r = i_p // tiles * BR + tl.arange(0, BR)
    o_c = i_p % tiles * BC + tl.arange(0, BC)
    m_r, m_c = o_r < T, o_c < D_T
    # A row sum each, for the caller to join: a second reduction here stops Triton 3.7 from compiling for sm_100.
    p_loss = loss + (i_l * tiles + i_p % tiles) * T + o_r
    if is_closed(gate, i_l, GATED):
        if COMPARE:
            tl.store(p_loss, tl.zeros((BR,), tl.float32), mask=m_r)
        return
    m_counts = m_r
    if WEIGHTED:
        b_counts = tl.load(of_layer(token_weight, i_l, LAYERS) + o_r, mask=m_r, other=0.0)
        m_counts = b_counts != 0
    b_y = project_tile(
        of_layer(h_s, i_l, LAYERS), of_layer(weight, i_l, LAYERS), o_r, o_c, m_counts, m_c, D_S, s_h_s, s_weight,
        BR, BC, BK, WIDEN,
    )  # fmt: skip
    if BIASED:
        b_y += tl.load(of_layer(bias, i_l, LAYERS) + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if COMPARE:
        b_y -= load_tile(of_layer(h_t, i_l, LAYERS), o_r, o_c, s_h_t, m_counts, m_c, True)
        b_y = tl.where(m_counts[:, None] & m_c[None, :], b_y, 0.0)
        b_squares = tl.sum(b_y * b_y, 1)
        if WEIGHTED:
            b_squares *= b_counts
            b_y *= b_counts[:, None]
        tl.store(p_loss, b_squares, mask=m_r)
    if STORE:
        store_tile(of_layer(difference, i_l, LAYERS), o_r, o_c, D_T, m_r, m_c, b_y)


@triton.jit
def _normalized(b_x, m_x, D, EPS: tl.constexpr, KIND: tl.constexpr):
    """Normalised rows and the reciprocal of what they were divided by: [BR, BC] and [BR]."""
    if KIND == 1:
        b_x = tl.where(m_x, b_x - (tl.sum(b_x, 1) / D)[:, None], 0.0)
        b_scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + EPS)
    else:
        b_scale = 1.0 / tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), EPS)
    return b_x * b_scale[:, None], b_scale


@triton.jit
def row_kernel(
    x, h_t, token_weight, gate, gradient, loss, T, D, s_x, s_h_t,
    LAYERS: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr,
    STORE: tl.constexpr, OWES: tl.constexpr, DOUBLE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The loss of whole rows x [T, D], and its gradient in x, which may lie where x does. OWES: zeros if closed."""
    i_l, i_p = tl.program_id(1), tl.program_id(0)
    p_loss = loss + i_l * tl.num_programs(0) + i_p
    o_r, o_c = i_p * BR + tl.arange(0, BR), tl.arange(0, BC)
    m_r, m_c = o_r < T, o_c < D
    if is_closed(gate, i_l, GATED):
        tl.store(p_loss, 0.0)
        if OWES:
            store_tile(of_layer(gradient, i_l, LAYERS), o_r, o_c, D, m_r, m_c, tl.zeros((BR, BC), tl.float32))
        return
    m_counts = m_r
    if WEIGHTED:
        b_counts = tl.load(of_layer(token_weight, i_l, LAYERS) + o_r, mask=m_r, other=0.0)
        m_counts = b_counts != 0
    b_x = load_tile(of_layer(x, i_l, LAYERS), o_r, o_c, s_x, m_counts, m_c, True)
    b_t = load_tile(of_layer(h_t, i_l, LAYERS), o_r, o_c, s_h_t, m_counts, m_c, True)
    m_x = m_counts[:, None] & m_c[None, :]
    if DOUBLE:
        b_x, b_t = b_x.to(tl.float64), b_t.to(tl.float64)
    if KIND != 0:
        b_x, b_scale = _normalized(b_x, m_x, D, EPS, KIND)
        b_t, _ = _normalized(b_t, m_x, D, EPS, KIND)
    b_d = tl.where(m_x, b_x - b_t, 0.0)
    b_squares = tl.sum(b_d * b_d, 1)
    if WEIGHTED:
        b_squares *= b_counts
        b_d *= b_counts[:, None]
    tl.store(p_loss, tl.sum(b_squares, 0))
    if STORE:
        if KIND == 1:
            b_mean, b_along = tl.sum(b_d, 1) / D, tl.sum(b_d * b_x, 1) / D
            b_d = (b_d - b_mean[:, None] - b_x * b_along[:, None]) * b_scale[:, None]
        if KIND == 2:
            b_along = tl.where(b_scale < 1.0 / EPS, tl.sum(b_d * b_x, 1), 0.0)
            b_d = (b_d - b_x * b_along[:, None]) * b_scale[:, None]
        store_tile(of_layer(gradient, i_l, LAYERS), o_r, o_c, D, m_r, m_c, b_d.to(tl.float32))


def hidden_mses(layers: Sequence[HiddenLayer], normalize: str | None, gate: Tensor | None) -> list[Solution]:
    """Loss and gradients of every layer, layers that look alike in one launch a kernel. A closed gate gives zeros."""
    layers = [HiddenLayer(_dense(layer.tensors), layer.wants) for layer in layers]
    solutions: dict[int, Solution] = {}
    for members in _alike(layers):
        gates = None if gate is None else torch.stack([gate[i] for i in members])
        solutions |= zip(members, _launch([layers[i] for i in members], normalize, gates), strict=True)
    return [solutions[i] for i in range(len(layers))]


def _dense(tensors: HiddenTensors) -> HiddenTensors:
    """Every tensor with the elements of a row next to each other."""
    dense = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)
    return HiddenTensors(*dense)  # type: ignore[arg-type]


def _alike(layers: Sequence[HiddenLayer]) -> Iterator[list[int]]:
    """Indices of layers that one launch can serve."""
    groups: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        key = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in layer.tensors)
        groups.setdefault((key, layer.wants), []).append(i)
    for members in groups.values():
        for first in range(0, len(members), MOST_LAYERS_PER_LAUNCH):
            yield members[first : first + MOST_LAYERS_PER_LAUNCH]


def _launch(layers: Sequence[HiddenLayer], normalize: str | None, gate: Tensor | None) -> list[Solution]:
    first, wants = layers[0].tensors, layers[0].wants
    (tokens, d_s), d_t, count = first.h_s.shape, first.h_t.shape[1], len(layers)
    h_s, h_t, weight, bias, token_weight = zip(*(layer.tensors for layer in layers), strict=True)
    gradients = [layer.empty_gradients() for layer in layers]
    d_state, d_weight, d_bias = zip(*gradients, strict=True)
    target = target_of(first.h_s.device)
    tile = tiling(target, first.h_s.dtype != torch.float32)
    gated: dict[str, Any] = {"gate": gate, "LAYERS": count, "GATED": gate is not None}
    is_weighted = first.token_weight is not None
    weighted = {"token_weight": token_weight if is_weighted else None, "WEIGHTED": is_weighted}
    dots = {"WIDEN": INTERPRETED, **tile.options()}  # the interpreter's bf16 products are wrong

    compared, difference = h_s, d_state  # what is compared with the teacher, and the gradient in it
    if first.weight is not None:
        if any(wants) or normalize is not None:
            difference = first.h_s.new_empty((count, tokens, d_t)).unbind()
        tiles = triton.cdiv(d_t, tile.columns)
        grid = (triton.cdiv(tokens, tile.rows) * tiles, count)
        parts = first.h_s.new_empty((count, tiles * tokens), dtype=torch.float32)
        difference_kernel[grid](
            h_s=h_s,
            h_t=h_t,
            weight=weight,
            bias=bias if first.bias is not None else None,
            difference=difference,
            loss=parts,
            T=tokens,
            D_T=d_t,
            D_S=d_s,
            s_h_s=first.h_s.stride(0),
            s_h_t=first.h_t.stride(0),
            s_weight=first.weight.stride(0),
            BIASED=first.bias is not None,
            COMPARE=normalize is None,
            STORE=any(wants) or normalize is not None,
            **gated,
            **weighted,
            **dots,
        )
        compared = difference
    if first.weight is None or normalize is not None:
        rows = row_tiling(d_t)
        grid = (triton.cdiv(tokens, rows["BR"]), count)
        parts = first.h_s.new_empty((count, grid[0]), dtype=torch.float32)
        row_kernel[grid](
            x=compared,
            h_t=h_t,
            gradient=difference,
            loss=parts,
            T=tokens,
            D=d_t,
            s_x=compared[0].stride(0),
            s_h_t=first.h_t.stride(0),
            KIND=NORMALIZE[normalize],
            EPS=L2_EPS if normalize == "l2" else LAYERNORM_EPS,
            STORE=any(wants),
            OWES=first.weight is None and wants[0],
            DOUBLE=normalize is not None and d_t <= NARROW,
            **gated,
            **weighted,
            **rows,
        )
    if first.weight is not None and wants[0]:
        state_kernel[(triton.cdiv(tokens, tile.rows) * triton.cdiv(d_s, tile.columns), count)](
            g=difference,
            weight=weight,
            out=d_state,
            T=tokens,
            D_OUT=d_t,
            D_IN=d_s,
            s_g=d_t,
            s_weight=first.weight.stride(0),
            s_out=d_s,
            **gated,
            **dots,
        )
    if wants[1] or wants[2]:
        columns = triton.cdiv(d_s, tile.columns) if wants[1] else 1
        weight_kernel[(triton.cdiv(d_t, tile.rows) * columns, count)](
            g=difference,
            x=h_s,
            out=d_weight,
            bias_out=d_bias,
            T=tokens,
            D_OUT=d_t,
            D_IN=d_s,
            s_g=d_t,
            s_x=first.h_s.stride(0),
            s_out=d_s,
            WEIGHT=wants[1],
            BIAS=wants[2],
            ACCUMULATE=False,
            **gated,
            **weighted,
            **dots,
        )
    losses = parts.sum(1) / (tokens * d_t)
    return [Solution(loss, gradient) for loss, gradient in zip(losses, gradients, strict=True)]


def row_tiling(width: int) -> dict[str, int]:
    """About 4096 elements a program, in float64 1024: a row is held in registers whole, so that it is read once."""
    columns = triton.next_power_of_2(width)
    elements = 1024 if columns <= NARROW else 4096
    return {"BR": max(elements // columns, 1), "BC": columns, "num_warps": 4 if columns <= 4096 else 8}
