"""The whole distillation step on a GPU, beside the same step written the usual way.

The contests of `bench.suites.whole_step` are the seam: it says what a step is and which contenders there are; here
their runs are timed by the wall, on the host and, where a step can be captured, by replay, and the dearest kernels are
named.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu import timing
from bench.gpu.context import Context, Item
from bench.harness.contest import Contest, Run, Unavailable


def towers(context: Context) -> Iterator[Item]:
    from bench.suites import whole_step

    sizes = None
    if context.rehearse:
        sizes = whole_step.Sizes((4, 32, 4), (2, 24, 3), image=32, batch=2, classes=8, relation_heads=2)
    for contest in whole_step.contests(context.device, sizes):
        for name in contest.contenders:
            yield Item(
                f"{contest.name} | {name}",
                lambda contest=contest, name=name: _timed(contest, name, context),  # type: ignore[misc]
            )


def _timed(contest: Contest, name: str, context: Context) -> dict[str, Any]:
    try:
        run: Run = contest.contenders[name]()
        found = timing.measured(run, context)
    except Unavailable as reason:
        return {"note": str(reason)}
    found["kernels"] = timing.by_kernel(run, context, most=20)
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


GROUPS: dict[str, Callable[[Context], Iterator[Item]]] = {"towers": towers}
