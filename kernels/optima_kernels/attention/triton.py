"""How the attention-map kernels are launched: which layers share a launch, in which tiles, with which memory."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from optima_kernels.attention import blocked
from optima_kernels.attention.problem import (
    Layer,
    Options,
    Solution,
    empty_gradients,
    gradient_factor,
    known_terms,
)
from optima_kernels.attention.tiles import COUNTING, Tiles, Tiling, padded, tiles_of
from optima_kernels.attention.triton_kernels import count_kernel, key_kernel, lse_kernel, query_kernel
from optima_kernels.attention.triton_mean_kernels import mean_kernel, mean_key_kernel, mean_query_kernel
from optima_kernels.attention.triton_online_kernel import online_kernel
from optima_kernels.shared.dispatch import INTERPRETED
from optima_kernels.shared.pointers import MOST_LAYERS_PER_LAUNCH
from optima_kernels.shared.target import target_of

LOG2E = math.log2(math.e)

NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2

# What score gradients are multiplied by before they are rounded to float16 for a product: the mean map element is
# 1 / keys, and the gradient of MSE smaller still, where float16 has few bits or none. They are at most 1.
FLOAT16_GAIN = 2**14

# Of queries, bytes that leave registers for two walks of `online_kernel`, even without gradients.
WIDEST_ROW = 256

# Quotients are stored for as many queries and keys as whole tiles of every kernel of means have.
WHOLE_TILES = 64


def solve(layers: Sequence[Layer], options: Options, gate: Tensor | None) -> list[Solution]:
    """Every layer's sums and gradients, layers that look alike in one launch a kernel; `gate` [L] on their device."""
    with torch.cuda.device_of(layers[0].q_s):  # type: ignore[no-untyped-call]
        results: dict[int, Solution] = {}
        readable = [_readable(layer) for layer in layers]
        for members in _alike(readable):
            tiles = _tiles(readable[members[0]], options)
            if tiles is None:
                solutions = [_by_torch(layers[i], options) for i in members]
            else:
                solutions = _launch([readable[i] for i in members], options, tiles, _gates(gate, members))
            results |= zip(members, solutions, strict=True)
        return [results[i] for i in range(len(layers))]


def _gates(gate: Tensor | None, members: Sequence[int]) -> Tensor | None:
    """Those of some layers, in float32; an index made of a list would have to be sent to the device."""
    if gate is None:
        return None
    return (gate if len(members) == len(gate) else torch.stack([gate[i] for i in members])).float()


def _by_torch(layer: Layer, options: Options) -> Solution:
    """By torch's operators on the same device, for what the kernels do not take."""
    solution = blocked.solve([layer], options, None)[0]
    if not options.with_grad:
        return solution
    grad_q, grad_k = empty_gradients(layer, "triton")
    assert solution.grad_q is not None
    assert solution.grad_k is not None
    return solution._replace(grad_q=grad_q.copy_(solution.grad_q), grad_k=grad_k.copy_(solution.grad_k))


def _readable(layer: Layer) -> Layer:
    """q and k of one dtype a side, with features next to each other; a mask of bytes or floats; log-sum-exps in
    float32."""
    tensors: dict[str, Any] = {}
    for side in ("s", "t"):
        q, k = getattr(layer, f"q_{side}"), getattr(layer, f"k_{side}")
        dtype = torch.promote_types(q.dtype, k.dtype)
        tensors[f"q_{side}"], tensors[f"k_{side}"] = (_dense_rows(x.to(dtype)) for x in (q, k))
        lse = getattr(layer, f"lse_{side}")
        if lse is not None:
            tensors[f"lse_{side}"] = lse.float().contiguous()
    if layer.mask is not None:
        mask = layer.mask.float() if layer.mask.dtype == torch.float64 else layer.mask
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        tensors["mask"] = mask
    if layer.key_lengths is not None:
        tensors["key_lengths"] = layer.key_lengths.contiguous()
    return layer._replace(**tensors)


def _dense_rows(x: Tensor) -> Tensor:
    """Rows of a tile are addressed in 32 bits."""
    return x if x.stride(3) == 1 and x.stride(2) < 2**22 else x.contiguous()


def _alike(layers: Sequence[Layer]) -> Iterator[list[int]]:
    """Indices of layers that one launch can serve."""
    groups: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        key = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in layer)
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        for first in range(0, len(members), MOST_LAYERS_PER_LAUNCH):
            yield members[first : first + MOST_LAYERS_PER_LAUNCH]


def _tiles(layer: Layer, options: Options) -> Tiles | None:
    """None where the kernels do not take such a layer."""
    tiles = tiles_of(
        target_of(layer.q_s.device),
        max(padded(layer.q_s.shape[3]), padded(layer.q_t.shape[3])),
        torch.promote_types(layer.q_s.dtype, layer.q_t.dtype),
        layer.q_s.shape[2],
        reads_maps=options.mean_heads or _per_element(layer.mask),
        grouped=layer.k_s.shape[1] < layer.q_s.shape[1],
    )
    return None if tiles is None or (options.mean_heads and tiles.mean is None) else tiles


def _launch(layers: Sequence[Layer], options: Options, tiles: Tiles, gate: Tensor | None) -> list[Solution]:
    """Layers of one look; `gate` has an entry for each of them."""
    first = layers[0]
    gain = FLOAT16_GAIN if first.q_s.dtype == torch.float16 else 1
    rules: dict[str, Any] = {
        "key_lengths": _pointers(layers, "key_lengths"),
        "gate": gate,
        "N": first.q_s.shape[2],
        "M": first.k_s.shape[2],
        "LAYERS": len(layers),
        "CAUSAL": options.causal,
        "LENGTHS": first.key_lengths is not None,
        "GATED": gate is not None,
        "WIDEN": INTERPRETED,  # its bf16 products are wrong
        **_mask_arguments(first.mask, _pointers(layers, "mask")),
    }
    counts = _terms(layers, options, rules)
    gradients = [empty_gradients(layer, "triton") if options.with_grad else (None, None) for layer in layers]
    solve_layers = _means if options.mean_heads else _matches
    totals = solve_layers(layers, options, tiles, rules, gain, gradients)
    each: Sequence[Tensor | float] = counts.unbind() if isinstance(counts, Tensor) else [counts] * len(layers)
    return [
        Solution(total, terms, *grads) for total, terms, grads in zip(totals.unbind(), each, gradients, strict=True)
    ]


def _pointers(layers: Sequence[Layer], name: str) -> tuple[Tensor, ...] | None:
    return None if getattr(layers[0], name) is None else tuple(getattr(layer, name) for layer in layers)


def _side(layers: Sequence[Layer], side: str) -> dict[str, Any]:
    """What kernels are told of q and k of student or teacher."""
    q, k = getattr(layers[0], f"q_{side}"), getattr(layers[0], f"k_{side}")
    upper, width = side.upper(), q.shape[3]
    return {
        f"q_{side}": _pointers(layers, f"q_{side}"),
        f"k_{side}": _pointers(layers, f"k_{side}"),
        f"s_q_{side}": q.stride(),
        f"s_k_{side}": k.stride(),
        f"scale_{side}": getattr(layers[0], f"scale_{side}") * LOG2E,
        f"GROUP_{upper}": q.shape[1] // k.shape[1],
        f"D_{upper}": width,
        f"BD_{upper}": padded(width),
    }


def _rows(layers: Sequence[Layer], heads: int, extent: int) -> Tensor:
    """Memory for float32 rows: [layers, B, heads, extent]."""
    q_s = layers[0].q_s
    return q_s.new_empty((len(layers), q_s.shape[0], heads, extent), dtype=torch.float32)


def _up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _log_sums(layers: Sequence[Layer], side: str, tiling: Tiling, rules: dict[str, Any]) -> tuple[Tensor, ...]:
    """Each layer's log-sum-exps [B, H, N], those handed in or new ones."""
    given = _pointers(layers, f"lse_{side}")
    if given is not None:
        return given
    queries_of = [getattr(layer, f"q_{side}") for layer in layers]
    scale, k = getattr(layers[0], f"scale_{side}") * LOG2E, getattr(layers[0], f"k_{side}")
    if scale < 0:
        queries_of, scale = [-q for q in queries_of], -scale
    batch, heads, queries, width = queries_of[0].shape
    lse, row_tiles = _rows(layers, heads, queries), triton.cdiv(queries, tiling.queries)
    lse_kernel[(row_tiles * batch * heads, len(layers))](
        q=tuple(queries_of),
        k=_pointers(layers, f"k_{side}"),
        s_q=queries_of[0].stride(),
        s_k=k.stride(),
        lse=lse,
        H=heads,
        TILES=row_tiles,
        scale=scale,
        GROUP=heads // k.shape[1],
        D=width,
        BD=padded(width),
        **tiling.arguments(),
        **rules,
    )
    return lse.unbind()


def _terms(layers: Sequence[Layer], options: Options, rules: dict[str, Any]) -> Tensor | float:
    """How many terms the loss has: [layers, B] in float32, or a number for all of them."""
    first = layers[0]
    known = known_terms(first, options)
    if known is not None:
        return known
    (batch, heads, queries, _), keys = first.q_s.shape, first.k_s.shape[2]
    maps = 1 if options.mean_heads else heads
    mse = options.kind == "mse"
    if first.mask is not None:
        distinct = first.mask.shape[1]
        row_tiles = triton.cdiv(queries, COUNTING.queries)
        count = _rows(layers, distinct, row_tiles)
        rules = {name: x for name, x in rules.items() if name != "WIDEN"}
        count_kernel[(row_tiles * batch * distinct, len(layers))](
            count=count, H=distinct, TILES=row_tiles, MSE=mse, **COUNTING.arguments(), **rules
        )
        return count.sum((2, 3)) * (maps // distinct)
    lengths = torch.stack([layer.key_lengths for layer in layers if layer.key_lengths is not None]).clamp(0, keys)
    lengths = lengths.float()
    if not mse:
        return maps * queries * (lengths > 0).float()
    if not options.causal:
        return maps * queries * lengths
    on_diagonal = lengths.clamp(max=queries)
    return maps * (on_diagonal * (on_diagonal + 1) / 2 + (queries - on_diagonal) * lengths)


Gradients = Sequence[tuple[Tensor, Tensor] | tuple[None, None]]


def _matches(
    layers: Sequence[Layer], options: Options, tiles: Tiles, rules: dict[str, Any], gain: int, gradients: Gradients
) -> Tensor:
    """Sums of terms [layers, B], head by head; `gradients` are filled."""
    first, mse, with_grad = layers[0], options.kind == "mse", options.with_grad
    (batch, heads, queries, _), (heads_k, keys) = first.q_s.shape, first.k_s.shape[1:3]
    online = None
    if not mse and (first.lse_s is None or first.lse_t is None):
        if with_grad:
            online = tiles.online if gain == 1 else None
        elif max(q.shape[3] * q.element_size() for q in (first.q_s, first.q_t)) <= WIDEST_ROW:
            online = tiles.query
    query = online or tiles.query
    whole = _up_to(queries, max(query.queries, tiles.key.queries))
    row_tiles, key_tiles = whole // query.queries, triton.cdiv(keys, tiles.key.keys)
    grad_q, grad_k = zip(*gradients, strict=True)
    total = _rows(layers, heads, row_tiles)
    shared = rules | _side(layers, "s") | _side(layers, "t") | {"H": heads, "N_WHOLE": whole}
    shared["grad_scale"] = first.scale_s / gain * gradient_factor(first, options)
    for side in ("sums_s", "sums_t"):
        shared[side] = _rows(layers, heads, whole).unbind() if with_grad else None

    told: dict[str, Any] = {
        "MSE": mse,
        "GAIN": gain,
        "row_term": _rows(layers, heads, whole).unbind() if mse else None,
    }
    by_query: dict[str, Any] = {"total": total, "TILES": row_tiles, **query.arguments()}
    grid = (row_tiles * batch * heads, len(layers))
    if online is not None:
        online_kernel[grid](grad_q=grad_q if with_grad else None, GRAD=with_grad, **by_query, **shared)
    else:
        lse = {f"lse_{side}": _log_sums(layers, side, tiles.lse, rules) for side in ("s", "t")}
        for loss, grad in [(True, False), (False, True)] if mse and with_grad else [(True, with_grad)]:
            query_kernel[grid](
                grad_q=grad_q if grad else None, LOSS=loss, GRAD=grad, **by_query, **lse, **told, **shared
            )
    if with_grad:
        key_kernel[(key_tiles * batch * heads_k, len(layers))](
            grad_k=grad_k, TILES=key_tiles, **tiles.key.arguments(), **told, **shared
        )
    return total.sum((2, 3))


def _means(
    layers: Sequence[Layer], options: Options, tiles: Tiles, rules: dict[str, Any], gain: int, gradients: Gradients
) -> Tensor:
    """Sums of terms [layers, B] of means over heads; `gradients` are filled."""
    first = layers[0]
    lse_s, lse_t = (_log_sums(layers, side, tiles.lse, rules) for side in ("s", "t"))
    shared = rules | _side(layers, "s")
    batch, heads, queries, _ = first.q_s.shape
    heads_k, keys = first.k_s.shape[1:3]
    assert tiles.mean is not None
    padded_queries, padded_keys = (_up_to(size, WHOLE_TILES) for size in (queries, keys))
    row_tiles, key_tiles = padded_queries // tiles.mean.queries, padded_keys // tiles.mean.keys
    total = _rows(layers, 1, row_tiles * key_tiles)
    quotients = None
    if options.with_grad:
        dtype = torch.bfloat16 if first.q_s.dtype == torch.bfloat16 else torch.float32
        shape = (batch, padded_queries, padded_keys)
        quotients = tuple(first.q_s.new_empty(shape, dtype=dtype) for _ in layers)
    stored = {"quotients": quotients, "s_quotients": None if quotients is None else quotients[0].stride()}
    mean_kernel[(batch * row_tiles * key_tiles, len(layers))](
        total=total,
        TILES=row_tiles,
        KEY_TILES=key_tiles,
        HEADS_S=heads,
        HEADS_T=first.q_t.shape[1],
        MSE=options.kind == "mse",
        GRAD=options.with_grad,
        **tiles.mean.arguments(),
        **stored,
        **shared,
        **_side(layers, "t"),
        lse_s=lse_s,
        lse_t=lse_t,
    )
    if options.with_grad:
        grad_q, grad_k = zip(*gradients, strict=True)
        whole = _up_to(queries, max(tiles.query.queries, tiles.key.queries))
        row_tiles, key_tiles = whole // tiles.query.queries, triton.cdiv(keys, tiles.key.keys)
        shared = shared | stored | {"H": heads, "N_WHOLE": whole, "unit": gain / heads}
        shared["grad_scale"] = first.scale_s / gain * gradient_factor(first, options)
        shared["row_term"], shared["sums_s"] = (_rows(layers, heads, whole).unbind() for _ in range(2))
        mean_query_kernel[(row_tiles * batch * heads, len(layers))](
            grad_q=grad_q, lse_s=lse_s, TILES=row_tiles, **tiles.query.arguments(), **shared
        )
        mean_key_kernel[(key_tiles * batch * heads_k, len(layers))](
            grad_k=grad_k, TILES=key_tiles, **tiles.key.arguments(), **shared
        )
    return total.sum((2, 3))


def _mask_arguments(mask: Tensor | None, masks: tuple[Tensor, ...] | None) -> dict[str, Any]:
    """What kernels are told of masks."""
    if mask is None:
        return {"mask": None, "s_mask": None, "MASK": NO_MASK, "PER_ELEMENT": False, "LOWEST": 0.0}
    return {
        "mask": masks,
        "s_mask": _strides(mask),
        "MASK": BOOL_MASK if mask.dtype == torch.uint8 else ADDITIVE_MASK,
        "PER_ELEMENT": _per_element(mask),
        "LOWEST": torch.finfo(mask.dtype).min if mask.is_floating_point() else 0.0,
    }


def _per_element(mask: Tensor | None) -> bool:
    """Whether a mask knows more than which keys a sample has."""
    return mask is not None and any(stride != 0 for stride in _strides(mask)[1:3])


def _strides(mask: Tensor) -> tuple[int, ...]:
    """0 where a mask broadcasts."""
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
