"""Times of every kernel and loss beside the machine's ceilings and beside what others would take."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu import shapes, timing
from bench.gpu.context import Context, Item
from bench.gpu.shapes import Shape
from bench.harness.contest import Unavailable


def ceilings(context: Context) -> Iterator[Item]:
    """What the machine reaches at best: copying, multiplying, taking exponentials."""
    side = 64 if context.rehearse else 8192

    def product(m: int, n: int, k: int) -> dict[str, Any]:
        a, b = (torch.randn(x, k, device=context.device).bfloat16() for x in (m, n))
        out = torch.empty(m, n, device=context.device, dtype=torch.bfloat16)
        found = timing.measured(lambda: (torch.mm(a, b.t(), out=out),), context)
        return found | _rates(found, flops=2.0 * m * n * k)

    def copy() -> dict[str, Any]:
        x = torch.randn(2**10 if context.rehearse else 2**29, device=context.device)
        y = torch.empty_like(x)
        found = timing.measured(lambda: (y.copy_(x),), context)
        return found | _rates(found, moved=2.0 * 4 * x.numel())

    yield Item("copy", copy)
    yield Item("product 8192", lambda: product(side, side, side))
    if not context.rehearse:
        for m, n, k in ((2048, 49408, 768), (2048, 768, 49408), (49408, 768, 2048), (9232, 1024, 768)):
            yield Item(f"product {m} x {n} x {k}", lambda m=m, n=n, k=k: product(m, n, k))  # type: ignore[misc]


def _rates(found: dict[str, Any], flops: float = 0.0, moved: float = 0.0, exps: float = 0.0) -> dict[str, float]:
    """Per second, in units of 10^12, by the replay or else by the wall."""
    seconds = 1e-3 * (found.get("graph") or found["wall"])
    amounts = {"tflops": flops, "tbytes": moved, "texps": exps}
    return {name: round(amount / seconds / 1e12, 3) for name, amount in amounts.items() if amount}


def timed(make: Callable[[Context], Iterator[Shape]]) -> Callable[[Context], Iterator[Item]]:
    """Ours first, of every shape, then the peers of every shape."""

    def items(context: Context) -> Iterator[Item]:
        found = list(make(context))
        for shape in found:
            yield Item(f"{shape.name} | optima", lambda shape=shape: _ours(shape, context))  # type: ignore[misc]
        for shape in found:
            for name, peer in shape.peers.items():
                yield Item(f"{shape.name} | {name}", lambda shape=shape, peer=peer: _peer(shape, peer, context))  # type: ignore[misc]

    return items


def _ours(shape: Shape, context: Context) -> dict[str, Any]:
    run = shape.ours()
    found = timing.measured(run, context)
    found |= _rates(found, shape.flops, shape.bytes, shape.exps)
    found["kernels"] = timing.by_kernel(run, context)
    return found


def _peer(shape: Shape, peer: Callable[[], timing.Run], context: Context) -> dict[str, Any]:
    try:
        found = timing.measured(peer(), context)
    except Unavailable as reason:
        return {"note": str(reason)}
    finally:
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    return found | _rates(found, shape.flops)


GROUPS: dict[str, Callable[[Context], Iterator[Item]]] = {
    "ceilings": ceilings,
    "linear": timed(shapes.linears),
    "linear-large": timed(shapes.large_linears),
    "attention": timed(shapes.attentions),
    "attention-masks": timed(shapes.masked_attentions),
    "hidden": timed(shapes.hiddens),
}
