"""Loading images on a GPU, where DALI is installed."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from bench.gpu.context import Context, Item
from bench.harness.measure import measure


def loaders(context: Context) -> Iterator[Item]:
    if importlib.util.find_spec("nvidia.dali" if importlib.util.find_spec("nvidia") else "nvidia") is None:
        yield Item("DALI", lambda: {"note": "nvidia-dali is not installed: nothing to measure"})
        return
    from bench.suites import loaders as suite

    for contest in suite.contests(context.device):

        def run(contest: Any = contest) -> dict[str, Any]:
            found = measure(contest, context.device, memory=False)
            return {"rows": found["rows"]}

        yield Item(contest.name, run)


GROUPS: dict[str, Callable[[Context], Iterator[Item]]] = {"loaders": loaders}
