"""The suites by name, imported when they are asked for.

A contest's module has `contests(device)` and `sweeps(device)`; a study's has `tables(rounds)`, TITLE and PAGE.
"""

from importlib import import_module
from typing import Any

import torch

from bench.harness.contest import Contest

CONTESTS = {
    "attention": "maps of attention: KL and MSE",
    "hidden": "hidden states: MSE",
    "logits": "predictions and vocabularies: KL",
    "whole_step": "a whole step of distillation",
    "bandit": "a round of 512 bandits",
    "loaders": "images from files",
    "generation": "captions, with and without a cache",
}
STUDIES = {
    "starts": "ways to start a student; half an hour, when asked for alone",
    "estimates": "what losses should take on an H100, by a model; needs triton",
}


def suite(name: str) -> Any:
    """The module of a suite."""
    return import_module(f"bench.suites.{name}")


def find(name: str, contest: str) -> Contest:
    """The contest of a suite on a CPU, one of a sweep included."""
    device = torch.device("cpu")
    for found in suite(name).contests(device):
        if found.name == contest:
            return found  # type: ignore[no-any-return]
    for sweep in suite(name).sweeps(device):
        for size in sweep.sizes:
            if sweep.contest(size).name == contest:
                return sweep.contest(size)  # type: ignore[no-any-return]
    raise ValueError(f"suite {name} has no contest {contest!r}")
