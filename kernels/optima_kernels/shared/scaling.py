"""Saved gradients times what autograd hands back, for several tensors in one pass.

torch's product of a 16-bit tensor with a float32 factor in float32 moves one element at a time: measured on an H100,
38 microseconds for what takes 10. And a factor without dimensions would be rounded to 16 bits first.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optima_kernels.shared.pointers import MOST_LAYERS_PER_LAUNCH, of_layer

BLOCK = 4096


@triton.jit
def scale_kernel(
    saved, out, factors, s_factors, scale, SIZE, LAYERS: tl.constexpr, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr
):  # fmt: skip
    """out [parts, SIZE] = saved [parts, SIZE] * factors [LAYERS, parts] * scale, rounded once; a factor of 0 gives 0,
    whatever was saved, and one of 1 IN_PLACE, where `out` is `saved`, moves nothing. Parts may be many: their programs
    lie along x, where a grid has room for 2^31."""
    tiles = tl.cdiv(SIZE, BLOCK)
    i_p, i_l = tl.program_id(0) // tiles, tl.program_id(1)
    o_x = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < SIZE
    o_part = i_p.to(tl.int64) * SIZE
    p_out = of_layer(out, i_l, LAYERS) + o_part + o_x
    factor = tl.load(factors + i_l * s_factors[0] + i_p * s_factors[1]).to(tl.float32) * scale
    if IN_PLACE:  # noqa: SIM102
        if factor == 1:
            return
    if factor == 0:
        tl.store(p_out, tl.zeros((BLOCK,), tl.float32).to(out[0].dtype.element_ty), mask=m_x)
        return

    b_x = tl.load(of_layer(saved, i_l, LAYERS) + o_part + o_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_out, (b_x * factor).to(out[0].dtype.element_ty), mask=m_x)


def scale_into(out: Sequence[Tensor], saved: Sequence[Tensor], factors: Tensor, scale: float = 1.0) -> None:
    """out[i] = saved[i] * factors[i] * scale, multiplied in float32; `out` may be `saved`.

    The tensors are contiguous and of one shape, on a GPU. `factors` is [L], or [L, P] with one for each of P equal
    parts of a tensor, such as its samples.
    """
    layers, parts = len(saved), factors.numel() // len(saved)
    size = saved[0].numel() // parts
    with torch.cuda.device_of(saved[0]):
        scale_kernel[(triton.cdiv(size, BLOCK) * parts, layers)](
            saved=tuple(saved),
            out=tuple(out),
            factors=factors,
            s_factors=(factors.stride(0), factors.stride(1) if factors.dim() == 2 else 0),
            scale=scale,
            SIZE=size,
            LAYERS=layers,
            BLOCK=BLOCK,
            IN_PLACE=all(x is y for x, y in zip(saved, out, strict=True)),
        )


def scaled(
    saved: Sequence[Tensor],
    layers: Sequence[int],
    factors: Tensor,
    scales: Sequence[float],
    dtypes: Sequence[torch.dtype],
    keep: bool,
) -> list[Tensor]:
    """saved[i] * factors[l] * scales[l] in dtypes[i], l being layers[i]; those that look alike in one launch.

    Made in the memory of what was saved where the dtype is the same, unless that is to `keep`.
    """
    groups: dict[Any, list[int]] = {}
    for i, (tensor, dtype, layer) in enumerate(zip(saved, dtypes, layers, strict=True)):
        groups.setdefault((tensor.shape, tensor.dtype, dtype, scales[layer]), []).append(i)
    results = list(saved)
    for (_, found, dtype, scale), alike in groups.items():
        for first in range(0, len(alike), MOST_LAYERS_PER_LAUNCH):
            members = alike[first : first + MOST_LAYERS_PER_LAUNCH]
            if keep or found != dtype:
                for i in members:
                    results[i] = torch.empty_like(saved[i], dtype=dtype)
            own = factors if len(members) == len(factors) else torch.stack([factors[layers[i]] for i in members])
            scale_into([results[i] for i in members], [saved[i] for i in members], own, scale)
    return results
