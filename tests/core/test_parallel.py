"""Two ranks are one process with the whole batch: arms, losses and weights, whatever shards them; and resuming."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import padded_models
import pytest
import torch
from padded_models import ROUNDS, distil

from optima_core.parallel import Ranks

FLOAT32 = torch.finfo(torch.float32).eps

Run = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs save what they come to."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(directory: Path) -> dict[str, Run]:
    """Runs of a single process."""
    return {
        "whole": distil(Ranks(), ROUNDS, "kl", directory / "whole-alone"),
        "whole_mse": distil(Ranks(), ROUNDS, "mse", directory / "whole_mse-alone"),
        "half": distil(Ranks(), ROUNDS // 2, "kl", directory / "half-alone"),
    }


@pytest.fixture(scope="module")
def together(alone: dict[str, Run], directory: Path) -> dict[str, dict[str, Run]]:
    """By strategy, what two ranks make of the same: one launch of torchrun, since starting takes the most time."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, padded_models.__file__, str(directory)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {name: torch.load(directory / f"{name}.pt", weights_only=False) for name in ("ddp", "fsdp")}


def assert_same_run(ours: Run, theirs: Run) -> None:
    """Sums in another order differ by some 1e-7, which 18 steps of descent multiply by less than 100.

    A divergence of attention maps is a small difference of log-sum-exps near 1, and errs by their rounding in float32.
    """
    assert [record.arm for record in ours["records"]] == [record.arm for record in theirs["records"]]
    for one, other in zip(ours["records"], theirs["records"], strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5, abs=FLOAT32)
        assert one.probe == pytest.approx(other.probe, rel=1e-5, abs=FLOAT32)
        assert one.reward == pytest.approx(other.reward, abs=1e-5)
    for part in ("student", "objective"):
        assert ours["state"][part].keys() == theirs["state"][part].keys()
        for name, tensor in ours["state"][part].items():
            # Softmax ignores what is added to all keys: the gradient of k's bias is rounding alone.
            if not name.endswith("k.bias"):
                torch.testing.assert_close(tensor, theirs["state"][part][name], rtol=1e-4, atol=1e-5)
    moments, others = (run["state"]["optimiser"]["state"] for run in (ours, theirs))
    assert {name: int(state["step"]) for name, state in moments.items()} == {
        name: int(state["step"]) for name, state in others.items()
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["whole", "whole_mse"])
def test_two_ranks_equal_one_process_with_the_whole_batch(
    strategy: str, name: str, alone: dict[str, Run], together: dict[str, dict[str, Run]]
) -> None:
    assert_same_run(together[strategy][name], alone[name])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_one_process_began_two_ranks_end(
    strategy: str, alone: dict[str, Run], together: dict[str, dict[str, Run]]
) -> None:
    resumed = together[strategy]["resumed"]
    assert_same_run(resumed | {"records": alone["half"]["records"] + resumed["records"]}, alone["whole"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_two_ranks_began_one_process_ends(
    strategy: str, alone: dict[str, Run], together: dict[str, dict[str, Run]], directory: Path, tmp_path: Path
) -> None:
    half = together[strategy]["half"]
    resumed = distil(Ranks(), ROUNDS, "kl", tmp_path, directory / f"half-{strategy}")
    assert_same_run(resumed | {"records": half["records"] + resumed["records"]}, alone["whole"])
