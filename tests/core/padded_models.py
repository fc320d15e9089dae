"""Models whose batches are uneven, distilled by one process or, as a script under torchrun, by several.

Slices of a batch hold unequal numbers of items, of sequences that count, and of tokens that count.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from plain_models import CLASSES, FEATURES, QUICK, TOKENS, TwoModules
from torch import Tensor
from torch.nn import functional as F

from optima_core import CheckpointStore, Distiller, DistillerConfig, Forward, LogitPrediction, ModulePair, WantedTaps
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


def distil(ranks: Ranks, rounds: int, kind: str, end: Path, start: Path | None = None) -> dict[str, Any]:
    """The records up to round `rounds`, and the state then, which is saved at `end`, as all ranks read it whole.

    start: where an earlier call has saved the state to go on from.
    """

    def load(step: int) -> Batch:
        draws = torch.Generator().manual_seed(step)
        x = torch.randn(SIZE, TOKENS, FEATURES, generator=draws)
        lengths = torch.randint(0, TOKENS + 1, (SIZE, 1), generator=draws)
        start, size = ranks.share(0, SIZE)
        x, labels, valid = x, x.mean(dim=1)[:, :CLASSES].argmax(dim=-1), torch.arange(TOKENS) < lengths
        return x[start : start + size], labels[start : start + size], valid[start : start + size]

    torch.manual_seed(3)
    teacher, student = Padded(16, 4, 2).eval().requires_grad_(False), Padded(8, 2, 1)
    ranks.shard(teacher)
    pairs = (ModulePair("front", 2, 4, 8, 16), ModulePair("back", 1, 2, 8, 16))
    config = DistillerConfig(rounds=ROUNDS, steps_per_round=3, optimiser=QUICK)
    config = replace(config, objective=replace(config.objective, attention_kind=kind))  # type: ignore[arg-type]
    distiller = Distiller(student, student, teacher, pairs, load, load(10**6), config, 0, ranks)
    if start is not None:
        saved = CheckpointStore(start, ranks=ranks).newest()
        assert saved is not None
        distiller.restore(saved)
    records = [distiller.run_round() for _ in range(distiller.round, rounds)]
    store = CheckpointStore(end, ranks=ranks)
    store.save(distiller.step, distiller.state_dict())
    return {"records": records, "state": store.load()}


def main(directory: Path) -> None:
    """For each strategy: a whole run, half a run, and a run that goes on from what one process saved in half-alone."""
    with join_ranks() as joined:
        for strategy in ("ddp", "fsdp"):
            ranks = replace(joined, strategy=strategy)  # type: ignore[arg-type]
            results = {
                "whole": distil(ranks, ROUNDS, "kl", directory / "whole"),
                "whole_mse": distil(ranks, ROUNDS, "mse", directory / "whole_mse"),
                "half": distil(ranks, ROUNDS // 2, "kl", directory / f"half-{strategy}"),
                "resumed": distil(ranks, ROUNDS, "kl", directory / "resumed", directory / "half-alone"),
            }
            if ranks.first:
                torch.save(results, directory / f"{strategy}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
