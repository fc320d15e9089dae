"""The suites by name. One is a module with `contests(device)` and `sweeps(device)`."""

from types import ModuleType

import torch

from bench import attention, bandit, hidden, loaders, logits, whole_step
from bench.contest import Contest

SUITES: dict[str, ModuleType] = {
    "attention": attention,
    "hidden": hidden,
    "logits": logits,
    "whole_step": whole_step,
    "bandit": bandit,
    "loaders": loaders,
}


def find(suite: str, name: str) -> Contest:
    """The contest of that name on a CPU, one of a sweep included."""
    device = torch.device("cpu")
    for contest in SUITES[suite].contests(device):
        if contest.name == name:
            return contest
    for sweep in SUITES[suite].sweeps(device):
        for size in sweep.sizes:
            if sweep.contest(size).name == name:
                return sweep.contest(size)
    raise ValueError(f"suite {suite} has no contest {name!r}")
