"""Two and four ranks are one process with the whole batch: arms, losses and weights, whatever shards them.

OPTIMA_TEST_BACKEND=inductor takes torch's own compiler for the layers, which takes a minute or so more.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import padded_models
import pytest
import torch
from padded_models import CASES, HALF, SHARED, distil
from plain_models import MODULES, TwoModules, load

from optima_core import Distiller, DistillerConfig, OptimaError, OptimiserConfig
from optima_core.parallel import Ranks
from optima_core.processes import Strategy

FLOAT32, FLOAT16 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16))
LAYOUTS = ("ddp", "fsdp", "hsdp")

shared = pytest.mark.parametrize(
    ("together", "case"), [(count, case) for count, cases in SHARED.items() for case in cases], indirect=["together"]
)
interrupted = pytest.mark.parametrize(
    ("together", "case"),
    [(count, case) for count, cases in SHARED.items() for case in cases if case in HALF],
    indirect=["together"],
)

Run = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs save what they come to."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(directory: Path) -> dict[str, Run]:
    """Runs of a single process, which compiles nothing."""
    place = directory / "alone"
    runs = {case: distil(Ranks(), place / case, **options | {"compile": False}) for case, options in CASES.items()}
    halves = {f"{case}, half": (case, rounds) for case, rounds in HALF.items()}
    return runs | {
        half: distil(Ranks(), place / half, rounds, **CASES[case]) for half, (case, rounds) in halves.items()
    }


@pytest.fixture(scope="module")
def launched() -> dict[int, dict[str, dict[str, Run]]]:
    """By the number of ranks, what `together` has found so far."""
    return {}


@pytest.fixture
def together(
    alone: dict[str, Run],
    launched: dict[int, dict[str, dict[str, Run]]],
    directory: Path,
    request: pytest.FixtureRequest,
) -> dict[str, dict[str, Run]]:
    """By layout, what several ranks make of the same: one launch of torchrun, since starting takes the most time."""
    if request.param in launched:
        return launched[request.param]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    done = subprocess.run(
        [*launcher, padded_models.__file__, str(directory)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    launched[request.param] = {name: torch.load(directory / f"{name}.pt", weights_only=False) for name in LAYOUTS}
    return launched[request.param]


def assert_same_run(ours: Run, theirs: Run) -> None:
    """Sums in another order differ by some 1e-7, which 18 steps of descent multiply by less than 100.

    A divergence of attention maps is a small difference of log-sum-exps near 1, and errs by their rounding in float32.
    """
    assert [record.arm for record in ours["records"]] == [record.arm for record in theirs["records"]]
    for one, other in zip(ours["records"], theirs["records"], strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5, abs=FLOAT32)
        assert one.probe == pytest.approx(other.probe, rel=1e-5, abs=FLOAT32)
        assert one.reward == pytest.approx(other.reward, abs=1e-5)
    parts = [(ours["state"][part], theirs["state"][part]) for part in ("student", "objective", "ema")]
    for one, other in (*parts, (ours["result"], theirs["result"])):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # Softmax ignores what is added to all keys: the gradient of k's bias is rounding alone.
            if not name.endswith("k.bias"):
                torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)
    moments, others = (run["state"]["optimiser"]["state"] for run in (ours, theirs))
    assert {name: int(state["step"]) for name, state in moments.items()} == {
        name: int(state["step"]) for name, state in others.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@shared
def test_ranks_equal_one_process_with_the_whole_batch(
    layout: str, case: str, alone: dict[str, Run], together: dict[str, dict[str, Run]]
) -> None:
    assert_same_run(together[layout][case], alone[case])


@pytest.mark.parametrize("together", SHARED, indirect=True)
@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_shards_skip_the_steps_that_overflow_as_whole_gradients_do(
    layout: str, together: dict[str, dict[str, Run]]
) -> None:
    ours, theirs = together[layout]["fp16"], together["ddp"]["fp16"]
    assert ours["state"]["scaler"] == theirs["state"]["scaler"]
    assert ours["state"]["scaler"]["scale"] < 2**16, "nothing overflowed"
    for one, other in zip(ours["records"], theirs["records"], strict=True):
        assert one.losses == pytest.approx(other.losses, rel=FLOAT16, abs=FLOAT32)


@pytest.mark.parametrize("together", SHARED, indirect=True)
@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_gradients_of_shards_are_exchanged_once_a_step_however_many_batches_it_has(
    layout: str, together: dict[str, Any]
) -> None:
    exchanges = together[layout]["exchanges"]
    assert exchanges[1] == exchanges[3] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@interrupted
def test_what_one_process_began_ranks_end(
    layout: str, case: str, alone: dict[str, Run], together: dict[str, dict[str, Run]]
) -> None:
    resumed = together[layout][f"{case}, resumed"]
    begun = alone[f"{case}, half"]["records"]
    assert_same_run(resumed | {"records": begun + resumed["records"]}, alone[case])


@pytest.mark.parametrize("layout", LAYOUTS)
@interrupted
def test_what_ranks_began_one_process_ends(
    layout: str, case: str, alone: dict[str, Run], together: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    half, place = together[layout][f"{case}, half"], Path(together[layout]["place"])
    resumed = distil(Ranks(), tmp_path, start=place / f"{case}, half", **CASES[case])
    assert_same_run(resumed | {"records": half["records"] + resumed["records"]}, alone[case])


@pytest.mark.parametrize(
    ("strategy", "options", "told"),
    [
        ("ddp", {"cuda_graphs": True}, "engine.cuda_graphs does not work on 2 ranks with ddp: .*; take engine.compile"),
        (
            "fsdp",
            {"optimiser": OptimiserConfig("apex")},
            "engine.optimiser.implementation apex does not work on 2 ranks with fsdp: .*; take adamw",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused_with_the_reason(
    strategy: Strategy, options: dict[str, Any], told: str
) -> None:
    teacher, student = TwoModules(16, 4, 2).eval(), TwoModules(8, 2, 1)
    config = DistillerConfig(**options)
    with pytest.raises(OptimaError, match=told):
        Distiller(student, student, teacher, MODULES, load, load(0), config, 0, Ranks(0, 2, strategy))


def test_groups_that_do_not_make_up_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="shard_over must be a divisor of the 4 ranks, got 3"):
        Ranks(0, 4, "hsdp", shard_over=3)
