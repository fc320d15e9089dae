"""Models of transformers, distilled by one process or, as a script under torchrun, by several."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_transformers
import torch
from torch import Tensor

from optima_core import Distiller, DistillerConfig, OptimiserConfig
from optima_core.integrations.huggingface import TransformersAdaptor, TransformersForward, pair_modules
from optima_core.parallel import Ranks, join_ranks
from optima_core.processes import leave

MODELS = ("SmolVLM", "GPT-2")
"""Three modules and packed images; a head that is the embedding, too."""


def distil(name: str, ranks: Ranks) -> dict[str, Any]:
    """The records of three rounds, and the student's weights then."""
    torch.manual_seed(3)
    student, teacher = tiny_transformers.make(name), tiny_transformers.make(name, 3).requires_grad_(False)
    whole = copy.deepcopy(student)
    drawn = [_labelled(tiny_transformers.CASES[name].batch()) for _ in range(4)]
    # A rank has one sample or the other, which hold unequal numbers of words.
    first, size = ranks.share(0, 2)
    batches = [{key: value[first : first + size] for key, value in batch.items()} for batch in drawn]
    ranks.shard(teacher)
    ours, theirs = TransformersAdaptor(student), TransformersAdaptor(teacher)
    forwards = TransformersForward(ours), TransformersForward(theirs)
    pairs = pair_modules(ours, theirs, batches[0])
    config = DistillerConfig(rounds=3, steps_per_round=2, optimiser=OptimiserConfig(learning_rate=1e-3))
    engine = Distiller(student, *forwards, pairs, lambda i: batches[1 + i % 3], batches[0], config, 0, ranks)
    records = [engine.run_round() for _ in range(3)]
    result = engine.gather_result(whole) if ranks.sharded else engine.result
    return {"records": records, "student": result.state_dict()}


def _labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def main(directory: Path) -> None:
    """For each strategy and model, a run."""
    with join_ranks() as joined:
        for strategy in ("ddp", "fsdp"):
            ranks = replace(joined, strategy=strategy)  # type: ignore[arg-type]
            results = {name: distil(name, ranks) for name in MODELS}
            if ranks.first:
                torch.save(results, directory / f"{strategy}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
