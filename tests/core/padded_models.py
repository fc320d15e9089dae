"""Models whose batches are uneven, distilled by one process or, as a script under torchrun, by several.

Slices of a batch hold unequal numbers of items, of sequences that count, and of tokens that count.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plain_models import CLASSES, FEATURES, QUICK, TOKENS, TwoModules
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from optima_core import (
    CheckpointStore,
    Distiller,
    DistillerConfig,
    Forward,
    LogitPrediction,
    ModulePair,
    ObjectiveConfig,
    WantedTaps,
)
from optima_core.compilation import compile_layers
from optima_core.parallel import Ranks, join_ranks
from optima_core.processes import leave

SIZE, ROUNDS = 7, 6
Batch = tuple[Tensor, Tensor, Tensor]


class Padded(TwoModules):
    """Sequences of different lengths, whose padding does not count; and a scalar that is trained."""

    def __init__(self, width: int, front: int, back: int) -> None:
        super().__init__(width, front, back)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, batch: Batch, wanted: WantedTaps) -> Forward:  # type: ignore[override]
        x, labels, valid = batch
        output = super().forward((x, labels), wanted)
        assert isinstance(output.prediction, LogitPrediction)
        logits, counted = output.prediction.logits * self.scale, valid[:, 0]
        loss = (F.cross_entropy(logits, labels, reduction="none") * counted).sum() / counted.sum().clamp(min=1)
        pairs = (valid[:, :, None] & valid[:, None, :])[:, None]
        taps = {
            name: tuple(
                tap._replace(valid=valid, attention=tuple(one._replace(mask=pairs) for one in tap.attention))
                for tap in found
            )
            for name, found in output.taps.items()
        }
        return Forward(loss, LogitPrediction(logits, counted.float()), taps, counted.sum())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mse": {"objective": ObjectiveConfig(attention_kind="mse")},
    "compiled": {"compile": True},
    "averaged": {"ema": 0.8, "accumulate": 3, "rounds": 3},
}
"""What is done alone and together, as options of the engine."""

HALF = {"plain": 3, "averaged": 1}
"""Rounds after which runs of some cases are interrupted."""

SHARED: dict[int, tuple[str, ...]] = {2: tuple(CASES)}
if os.environ.get("OPTIMA_TEST_LONG"):
    SHARED[4] = ("compiled", "averaged")
"""By the number of ranks, the cases that are done; OPTIMA_TEST_LONG adds those of four."""

HALF_PRECISION = {"precision": "fp16", "rounds": 2}
"""Done together: a slice's gradients overflow where those of the whole do not."""


def make_distiller(ranks: Ranks, **options: Any) -> Distiller[Batch]:
    """options: of `DistillerConfig`."""

    def load(step: int) -> Batch:
        draws = torch.Generator().manual_seed(step)
        x = torch.randn(SIZE, TOKENS, FEATURES, generator=draws)
        lengths = torch.randint(0, TOKENS + 1, (SIZE, 1), generator=draws)
        start, size = ranks.share(0, SIZE)
        x, labels, valid = x, x.mean(dim=1)[:, :CLASSES].argmax(dim=-1), torch.arange(TOKENS) < lengths
        return x[start : start + size], labels[start : start + size], valid[start : start + size]

    torch.manual_seed(3)
    teacher, student = Padded(16, 4, 2).eval().requires_grad_(False), Padded(8, 2, 1)
    config = DistillerConfig(**{"rounds": ROUNDS, "steps_per_round": 3, "optimiser": QUICK} | options)
    if config.compile and ranks.count > 1:
        compile_layers(teacher)
    ranks.shard(teacher)
    pairs = (ModulePair("front", 2, 4, 8, 16), ModulePair("back", 1, 2, 8, 16))
    return Distiller(student, student, teacher, pairs, load, load(10**6), config, 0, ranks)


def distil(ranks: Ranks, end: Path, until: int = ROUNDS, start: Path | None = None, **options: Any) -> dict[str, Any]:
    """The records up to round `until`, and the state and the result then, which all ranks read whole from `end`.

    Args:
        ranks: The processes of the run.
        end: Where the state is saved.
        until: The last round.
        start: Where an earlier call has saved the state to go on from.
        options: Of `DistillerConfig`.
    """
    distiller = make_distiller(ranks, **options)
    if start is not None:
        saved = CheckpointStore(start, ranks=ranks).newest()
        assert saved is not None
        distiller.restore(saved)
    records = [distiller.run_round() for _ in range(distiller.round, min(until, distiller.config.rounds))]
    store = CheckpointStore(end, ranks=ranks)
    store.save(distiller.step, distiller.state_dict())
    result = distiller.gather_result(Padded(8, 2, 1)) if ranks.sharded else distiller.result
    return {"records": records, "state": store.load(), "result": result.state_dict()}


class Exchanges(TorchDispatchMode):
    """Counts the reduce-scatters of what runs within."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def count_exchanges(ranks: Ranks, accumulate: int) -> int:
    """How often gradients of shards are exchanged in a step."""
    distiller = make_distiller(ranks, accumulate=accumulate)
    batches = map(distiller.load, range(accumulate))
    with Exchanges() as exchanges:
        distiller.training.run(batches, {"front": None})
    return exchanges.count


def layouts(joined: Ranks) -> dict[str, Ranks]:
    """By name, the ways in which the ranks share the work."""
    return {
        "ddp": joined,
        "fsdp": replace(joined, strategy="fsdp"),
        "hsdp": replace(joined, strategy="hsdp", shard_over=2),
    }


def main(directory: Path) -> None:
    """For each layout: every case, runs interrupted, and runs that go on with what one process left in `alone`."""
    # Traced and differentiated as for any backend, without a C++ compiler's seconds.
    torch.compile = partial(torch.compile, backend=os.environ.get("OPTIMA_TEST_BACKEND", "aot_eager"))
    with join_ranks() as joined:
        for name, ranks in layouts(joined).items():
            cases, place = SHARED[ranks.count], directory / f"{ranks.count}-{name}"
            results: dict[str, Any] = {case: distil(ranks, place / case, **CASES[case]) for case in cases}
            results["place"] = str(place)
            results["fp16"] = distil(ranks, place / "fp16", **HALF_PRECISION)
            results["exchanges"] = {parts: count_exchanges(ranks, parts) for parts in (1, 3)}
            for case, rounds in ((case, rounds) for case, rounds in HALF.items() if case in cases):
                half, resumed = f"{case}, half", f"{case}, resumed"
                results[half] = distil(ranks, place / half, rounds, **CASES[case])
                results[resumed] = distil(ranks, place / resumed, start=directory / "alone" / half, **CASES[case])
            if ranks.first:
                torch.save(results, directory / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
