"""Runs one group's items; started by bench/run_on_gpu.py, in a process that may die.

An item that fails leaves a line and the next begins, except after an error of CUDA, which no later call survives: then
the process ends with status 9, and is started again without what is done.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu import lines
from bench.gpu.context import Context, Item

DEAD = 9


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def is_fatal(error: BaseException) -> bool:
    """Whether the device's context is lost."""
    return "CUDA error" in str(error) or "Triton Error [CUDA]" in str(error) or "cudaError" in str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("group")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--code", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--package", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--warm", action="store_true", help="only compile: run every item, and keep nothing")
    options = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    mine = (options.part, options.group)
    done = {key[2] for key in lines.of_code(options.out, options.code) if key[:2] == mine}
    place: dict[str, Any] = {"part": options.part, "group": options.group, "code": options.code}
    context = Context(device, options.rehearse, options.seed, options.warm)
    left = 0
    try:
        module = importlib.import_module(options.package + options.part)
        items: Iterator[Item] = module.GROUPS[options.group](context)
        for item in items:
            if item.name in done:
                continue
            if time.monotonic() - started > options.seconds:
                left += 1
                continue
            if (status := _run(item, place, options)) is not None:
                return status
    except Exception as failure:  # the group's own code: what it needs may not be there
        lines.append(options.out, place | {"item": lines.GROUP, "ok": False, "error": one_line(failure)})
        return 1
    if not options.warm:
        lines.append(options.out, place | {"item": lines.GROUP, "ok": True, "left": f"{left} items" if left else ""})
    return 0


def _run(item: Item, place: dict[str, Any], options: argparse.Namespace) -> int | None:
    """The status to leave with, or None to go on."""
    print(f"begins: {item.name}", flush=True)
    begun = time.monotonic()
    try:
        line: dict[str, Any] = {"ok": True} | item.run()
    except Exception as failure:
        line = {"ok": False, "error": one_line(failure)}
        if not options.warm and is_fatal(failure):
            lines.append(options.out, place | {"item": item.name} | line)
            return DEAD
    if not options.warm:
        seconds = round(time.monotonic() - begun, 3)
        lines.append(options.out, place | {"item": item.name} | line | {"seconds": seconds})
    return None


if __name__ == "__main__":
    sys.exit(main())
