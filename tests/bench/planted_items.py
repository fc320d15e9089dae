"""Groups for tests of the GPU command: items that are right, wrong, raise CUDA's errors, die and never end."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from bench.gpu.context import Context, Item, Wrong


def right() -> dict[str, Any]:
    return {"error": 0.25}


def wrong() -> NoReturn:
    raise Wrong("off by one")


def faults() -> NoReturn:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def dies() -> NoReturn:
    os._exit(139)


def never_ends() -> dict[str, Any]:
    time.sleep(600)
    return {}


def of(*functions: Callable[[], dict[str, Any]]) -> Callable[[Context], Iterator[Item]]:
    return lambda context: (Item(f"{i} {function.__name__}", function) for i, function in enumerate(functions))


def unimportable(context: Context) -> Iterator[Item]:
    import a_package_that_is_not_there  # type: ignore[import-not-found]

    yield Item("never", a_package_that_is_not_there)


GROUPS = {
    "all right": of(right, right),
    "one wrong": of(right, wrong, right),
    "a fault": of(right, faults, right),
    "a death": of(right, dies, right),
    "no end": of(right, never_ends, right),
    "not there": unimportable,
    "slow": of(right, lambda: time.sleep(3) or {}, right),
}
