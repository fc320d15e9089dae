"""A rank of a job of two whose kernels are checked: prints, by case, what became of its choice of a backend.

Started by torchrun, with the folder for its caches as its argument.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed

from optima_kernels.shared import agreement, selfcheck_process, variants
from optima_kernels.shared.dispatch import choose_backend
from optima_kernels.shared.selfcheck_process import Answer

PATIENCE = 1.0
RIGHT = Answer("right", 1e-3)
WRONG = Answer("wrong", 0.5, "the loss has a relative error of 5.0e-01")
UNUSABLE = Answer("unusable", detail="no compiler")
TAKEN = Answer("unknown", detail="the memory is taken")


@dataclass(frozen=True)
class Choice:
    """What a rank chose, what it said, and how long it took, in seconds."""

    backend: str
    said: list[str]
    seconds: float


def choice(loss: str, variant: str) -> Choice:
    tensor: Any = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        try:
            backend = choose_backend(None, tensor, loss, lambda: variant)
        except RuntimeError as error:
            backend = str(error)
    return Choice(backend, [str(warning.message) for warning in caught], time.monotonic() - began)


def answers(*by_rank: Answer) -> Callable[[str, str, torch.device], Answer]:
    return lambda loss, variant, device: by_rank[distributed.get_rank()]


def main() -> None:
    os.environ["XDG_CACHE_HOME"] = str(Path(sys.argv[1]) / os.environ["RANK"])
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    questions = iter([(loss, variant) for loss in variants.DEFAULTS for variant in variants.usual(loss)])
    found: dict[str, Choice] = {}

    def together(case: str) -> None:
        distributed.barrier()
        found[case] = choice(*next(questions))

    def in_turn(case: str) -> None:
        question = next(questions)
        for turn in (0, 1):
            if rank == turn:
                found[case] = choice(*question)
            distributed.barrier()

    command = selfcheck_process.COMMAND
    if rank == 1:
        selfcheck_process.COMMAND = (sys.executable, "-c", "import os; input(); os.abort()")
    together("a process dies")
    selfcheck_process.COMMAND = command
    for process in selfcheck_process._running:
        process.end()

    for case, by_rank in {
        "wrong on rank 0": (WRONG, RIGHT),
        "unusable on 0, wrong on 1": (UNUSABLE, WRONG),
        "right": (RIGHT, RIGHT),
        "unknown on rank 1": (RIGHT, TAKEN),
    }.items():
        selfcheck_process.ask = answers(*by_rank)
        together(case)

    agreement.WAIT_SECONDS = PATIENCE
    for case, by_rank in {
        "unusable, late": (RIGHT, UNUSABLE),
        "right, late": (RIGHT, RIGHT),
        "right, late, of wrong ones": (WRONG, RIGHT),
    }.items():
        selfcheck_process.ask = answers(*by_rank)
        in_turn(case)
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps({case: asdict(x) for case, x in found.items()}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
