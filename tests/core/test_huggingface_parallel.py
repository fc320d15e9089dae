"""Two ranks that distil models of transformers are one process with the whole batch, with DDP and with FSDP2."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'optima-distill[hf]'")

import shared_transformers
from shared_transformers import MODELS, distil

from optima_core.parallel import Ranks


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By strategy and model: one launch of torchrun, since starting takes the most time."""
    directory = tmp_path_factory.mktemp("together")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, shared_transformers.__file__, str(directory)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: torch.load(directory / f"{name}.pt", weights_only=False) for name in ("ddp", "fsdp")}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_equal_one_process_with_the_whole_batch(name: str, together: dict[str, dict[str, Any]]) -> None:
    """Sums in another order differ by some 1e-7, which six steps of descent multiply by less than 100."""
    alone = distil(name, Ranks())
    assert {loss.split("/")[0] for loss in alone["records"][-1].losses} >= {"task", "logits", "hidden"}
    for strategy, runs in together.items():
        for ours, theirs in zip(runs[name]["records"], alone["records"], strict=True):
            assert ours.arm == theirs.arm, strategy
            assert ours.losses == pytest.approx(theirs.losses, rel=1e-5), strategy
            assert ours.probe == pytest.approx(theirs.probe, rel=1e-5), strategy
        assert runs[name]["student"].keys() == alone["student"].keys()
        for key, value in alone["student"].items():
            if key.endswith(("k_proj.bias", "c_attn.bias")):  # softmax ignores what is added to all keys
                continue
            torch.testing.assert_close(runs[name]["student"][key], value, rtol=1e-3, atol=1e-4, msg=f"{strategy} {key}")
