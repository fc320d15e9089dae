"""Matrix products on a CPU: of float32 by oneDNN where that is faster than torch's own choice, of bfloat16 in bfloat16
where the CPU has instructions for it.

torch hands float32 products to MKL, which runs AVX2 code on CPUs that are not Intel's. oneDNN, which every build of
torch for x86 brings along for its compiler, uses AVX-512 on any. Measured on one core of an AMD EPYC (Zen 5): MKL 110
GFLOP/s at every size, oneDNN 200 to 250 from 10 MFLOP up and as fast as MKL at 2; below, its call costs more than it
saves. Where both are told to use AVX2 alone, MKL reaches 90 to 100 in the layers of the shipped models, and oneDNN
takes 0.9 to 1.2 of its time. Both sum in float32, and the same input gives the same bits.

Products of bfloat16 reach 360 to 500 GFLOP/s there, with AVX512-BF16. Their sums, of float32, are rounded to bfloat16.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_FLOPS = 2**22


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """a [.., K], b [M, K] -> a b^T, or None where it is not to be had or no faster."""
    if not torch._C._has_mkldnn or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return None
    return cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise.default)


def is_faster(multiply_adds: int, *tensors: Tensor) -> bool:
    """Whether oneDNN is to make a product of this size of `tensors`."""
    return bool(
        2 * multiply_adds >= LEAST_FLOPS
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        and torch.backends.mkldnn.enabled
        and _onednn() is not None
    )


@cache
def _multiplies_bfloat16() -> bool:
    """Whether the CPU does, and torch has it do so."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def in_bfloat16(multiply_adds: int, *tensors: Tensor) -> bool:
    """Whether a product of this size of `tensors` is to be made in bfloat16."""
    return bool(
        2 * multiply_adds >= LEAST_FLOPS
        and all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)
        and torch.backends.mkldnn.enabled
        and _multiplies_bfloat16()
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K] times b [K, M], any strides, in fresh memory."""
    if is_faster(a.numel() * b.shape[1], a, b):
        return _by_onednn(a, b.t(), None)
    return a @ b


def products(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Each of a [L, N, K] times that of b [L, K, M], where `is_faster`: asked, and looked at, once for all of them."""
    onednn = _onednn()
    assert onednn is not None
    b = b.transpose(1, 2)
    a, b = (x if _is_dense(x[0]) else x.contiguous() for x in (a, b))
    for left, right in zip(a.unbind(), b.unbind(), strict=True):
        yield onednn(left, right, None, "none", [], "")


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out [N, M] += a [N, K] times b [K, M]; a product of narrower factors is rounded to their dtype before."""
    if a.dtype != out.dtype:
        return out.add_(a @ b)
    if is_faster(a.numel() * b.shape[1], out, a, b):
        return out.add_(_by_onednn(a, b.t(), None))
    return out.addmm_(a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, gradients included: x [..., K], weight [M, K], bias [M] -> [..., M]."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"  # the meta device has no autocast to ask about
        or torch.is_autocast_enabled(x.device.type)
        or x.dim() < 2
        or not is_faster(x.numel() * weight.shape[0], *given)
    ):
        return F.linear(x, weight, bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))  # type: ignore[no-untyped-call]


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    onednn = _onednn()
    assert onednn is not None
    return onednn(_dense(x), _dense(weight), bias, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """A matrix whose rows, or columns, lie one after the other: with gaps oneDNN takes code 2000 times slower."""
    return x if _is_dense(x) else x.contiguous()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.t().is_contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _by_onednn(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            product(rows, weight).view(x.shape) if wants_x else None,
            product(rows.t(), x.flatten(0, -2)) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )
