"""How much memory two ranks need to save a student that is sharded over them, and to load it again: DIRECTORY LAYERS.

Prints, as JSON for each rank, MiB: its share of the state, and what it needed beyond it at the peak to save it, to save
it while it goes on (with `asynchronous`) and learns, to save 128 MiB that do not lie in a row, and to load it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forked_ranks import fork
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from optima_core import CheckpointStore
from optima_core.parallel import Ranks
from optima_core.shards import local
from optima_core.state import optimiser_state

WIDTH = 2048
MIB = 2**20


def peak() -> float:
    """MiB of the largest resident set since `needed` began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def needed(work: Callable[[], Any]) -> float:
    """MiB by which the work raised the resident set."""
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    work()
    return peak() - before


def share_of(value: Any) -> float:
    """MiB of the tensors of this rank."""
    if isinstance(value, dict):
        return sum(map(share_of, value.values()))
    if isinstance(value, list):
        return sum(map(share_of, value))
    if not isinstance(value, Tensor):
        return 0
    return float(local(value).numel() * value.element_size()) / MIB


def measure(ranks: Ranks, directory: Path, layers: int) -> None:
    ranks = replace(ranks, strategy="fsdp")
    student = nn.Sequential(nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(layers)]))
    ranks.shard(student)
    optimiser = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    optimiser.zero_grad()
    state = {"student": get_model_state_dict(student), "optimiser": optimiser_state(student, optimiser)}
    found = {"share": share_of(state)}
    # What the first save imports is there before.
    CheckpointStore(directory / "first", ranks=ranks).save(1, {"x": torch.zeros(1)})
    store = CheckpointStore(directory / "at_once", ranks=ranks)
    found["save"] = needed(lambda: store.save(1, state))
    meanwhile = CheckpointStore(directory / "meanwhile", ranks=ranks, asynchronous=True)

    def save_and_go_on() -> None:
        meanwhile.save(1, state)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1)
        meanwhile.wait()

    found["meanwhile"] = needed(save_and_go_on)
    turned = {"x": torch.ones(WIDTH, 8 * WIDTH).T}
    found["turned"] = needed(lambda: CheckpointStore(directory / "turned", ranks=ranks).save(1, turned))
    meanwhile.close()
    saved = store.newest()
    assert saved is not None
    found["load"] = needed(lambda: saved.read(state))
    lines = ranks.gather(json.dumps(found))
    if ranks.first:
        print("\n".join(lines), flush=True)


def main(directory: Path, layers: int) -> None:
    if any(fork(2, lambda ranks: measure(ranks, directory, layers))):
        raise SystemExit("a rank failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
