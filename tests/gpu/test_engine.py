"""The engine on a GPU: what it waits for, what it taps, and CUDA graphs beside launched steps."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_step import make_distiller, random_batch

from optima.tasks.batches import TaskBatch
from optima_core import (
    BanditConfig,
    Distiller,
    DistillerConfig,
    Forward,
    LayerTap,
    LogitPrediction,
    ModulePair,
    ObjectiveConfig,
    OptimiserConfig,
    RewardConfig,
    Step,
    WantedTaps,
)
from optima_core.graphs import WARM_UP, CudaRecorder, ReplayedStep

STEPS = WARM_UP + 2
# A learning rate that float32 holds exactly, as the recordings' tensor must.
STEADY = OptimiserConfig(learning_rate=2.0**-7, schedule="constant", warmup=0.0)
CONFIG = DistillerConfig(steps_per_round=STEPS, optimiser=STEADY, bandit=BanditConfig("round_robin"), ema=0.5)


@contextmanager
def counted_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """A list that grows with every wait for an event; any other wait for the device is an error."""
    waits: list[None] = []
    synchronise = torch.cuda.Event.synchronize

    def counted(event: torch.cuda.Event) -> None:
        waits.append(None)
        torch.cuda.set_sync_debug_mode("default")
        synchronise(event)
        torch.cuda.set_sync_debug_mode("error")

    torch.cuda.synchronize()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.Event, "synchronize", counted)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("source", ["probe", "training"])
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "replayed"])
def test_a_round_waits_once_for_its_arm_and_for_nothing_else(
    graphs: bool, source: Literal["probe", "training"], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = make_distiller(device, replace(CONFIG, cuda_graphs=graphs, reward=RewardConfig(source)))
    for _ in distiller.names:
        distiller.run_round()
    pending, found = [], []
    with counted_waits(monkeypatch) as waits:
        for _ in range(6):
            pending.append(distiller.launch_round())
            found.append(len(waits))
    assert found == [1, 2, 3, 4, 5, 6]
    records = [record.result() for record in pending]
    assert [record.round for record in records] == [4, 5, 6, 7, 8, 9]
    assert all(len(record.modules) == 1 and record.tapped < 0.5 for record in records)
    assert all(record.step_seconds > 0 for record in records)


@pytest.mark.parametrize("source", ["probe", "training"])
def test_with_the_arm_unread_rounds_are_launched_without_any_wait(
    source: Literal["probe", "training"], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillerConfig(steps_per_round=2, accumulate=2, reward=RewardConfig(source), read_arm=False, ema=0.9)
    distiller = make_distiller(device, config)
    distiller.run_round()
    with counted_waits(monkeypatch) as waits:
        pending = [distiller.launch_round() for _ in range(3)]
    assert not waits
    records = [record.result() for record in pending]
    assert [record.round for record in records] == [2, 3, 4]
    assert all(record.ready() for record in pending)
    assert all(record.tapped == 1.0 for record in records)


def test_reading_the_arm_or_not_gives_the_same_rounds(device: torch.device) -> None:
    config = DistillerConfig(steps_per_round=2, rounds=6)
    read, unread = make_distiller(device, config), make_distiller(device, replace(config, read_arm=False))
    for _ in range(6):
        ours, theirs = read.run_round(), unread.run_round()
        assert ours.modules == theirs.modules
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-2, abs=1e-4)
        assert ours.probe == pytest.approx(theirs.probe, rel=1e-2, abs=1e-4)


def test_arms_and_losses_are_those_of_a_cpu(device: torch.device) -> None:
    config = DistillerConfig(steps_per_round=2, rounds=6)
    batch = random_batch()
    on_cpu = make_distiller("cpu", config, lambda _: batch)
    moved = TaskBatch(*(x.to(device) for x in batch))
    on_gpu = make_distiller(device, config, lambda _: moved)
    started = zip(on_cpu.training.trained, on_gpu.training.trained, strict=True)
    assert all(torch.equal(theirs, ours.cpu()) for theirs, ours in started)
    for _ in range(6):
        ours, theirs = on_gpu.run_round(), on_cpu.run_round()
        assert ours.modules == theirs.modules
        assert ours.tapped == theirs.tapped
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-2, abs=1e-4)


def weights(distiller: Distiller[Any]) -> dict[str, Tensor]:
    found = dict(distiller.training.learner.state_dict())
    average = distiller.training.average
    return found if average is None else found | {f"average.{k}": v for k, v in average.module.state_dict().items()}


def make_loader(device: torch.device) -> Any:
    batches = [random_batch(device) for _ in range(8)]
    return lambda number: batches[number % 8]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_graphs_are_launched_steps(
    precision: Literal["fp32", "bf16", "fp16"], accumulate: int, device: torch.device, seed: int
) -> None:
    """Bit for bit, if two launched runs are the same bits; what is recorded is the same kernels on the same numbers."""
    load = make_loader(device)
    config = replace(CONFIG, precision=precision, accumulate=accumulate)
    launched, again = make_distiller(device, config, load), make_distiller(device, config, load)
    replayed = make_distiller(device, replace(config, cuda_graphs=True), load)
    for _ in range(6):
        expected, repeated, found = (one.run_round() for one in (launched, again, replayed))
        assert found.modules == expected.modules
        if repeated == expected:
            assert found == expected
        else:
            assert found.losses == pytest.approx(expected.losses, rel=2e-2, abs=1e-3)
    assert replayed._replayed is not None
    assert len(replayed._replayed._recordings) == 3
    pairs = zip(weights(launched).items(), weights(again).values(), weights(replayed).values(), strict=True)
    for (name, one), other, found_weight in pairs:
        # Gradients that are rounding alone, as of k's bias, become whole steps of AdamW: in launched runs, too.
        spread = float((other.float() - one.float()).abs().max())
        assert float((found_weight.float() - one.float()).abs().max()) <= 10 * spread, name


def test_a_falling_learning_rate_reaches_the_graphs(device: torch.device) -> None:
    config = replace(
        CONFIG, rounds=6, optimiser=OptimiserConfig(learning_rate=1e-2), bandit=BanditConfig("all_modules")
    )
    launched, replayed = (make_distiller(device, replace(config, cuda_graphs=graphs)) for graphs in (False, True))
    for _ in range(6):
        ours, theirs = replayed.run_round(), launched.run_round()
        assert ours.learning_rate == theirs.learning_rate
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-2, abs=1e-4)
        assert ours.probe == pytest.approx(theirs.probe, rel=1e-2, abs=1e-4)
    assert ours.learning_rate == pytest.approx(0.0, abs=1e-9)


class Net(nn.Module):
    """A stack of linear layers with dropout."""

    def __init__(self, width: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(8 if i == 0 else width, width) for i in range(layers))
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, 3)

    def forward(self, batch: tuple[Tensor, Tensor], wanted: WantedTaps) -> Forward:
        (x, labels), taps = batch, []
        for i, layer in enumerate(self.encoder):
            x = self.dropout(layer(x).relu())
            if i in wanted.get("encoder", ()):
                taps.append(LayerTap(x))
        logits = self.head(x.mean(dim=1))
        return Forward(F.cross_entropy(logits, labels), LogitPrediction(logits), {"encoder": tuple(taps)})


def test_dropout_draws_the_same_new_numbers_in_every_replay(device: torch.device) -> None:
    config = DistillerConfig(optimiser=replace(STEADY, learning_rate=0.0), objective=ObjectiveConfig(attention=0))
    x = torch.randn(16, 5, 8, device=device)
    batch = x, torch.zeros(16, dtype=torch.int64, device=device)
    found: list[list[Tensor]] = []
    for graphs in (False, True):
        torch.manual_seed(0)
        teacher, student = Net(64, 4).to(device).eval(), Net(16, 2, dropout=0.5).to(device)
        step = Step(student, student, teacher, [ModulePair("encoder", 2, 4, 16, 64)], config)
        run = ReplayedStep(step, CudaRecorder(device)).run if graphs else step.run
        torch.manual_seed(1)
        found.append([run([batch], {"encoder": None}).values for _ in range(10)])
    launched, replayed = (torch.stack(losses) for losses in found)
    torch.testing.assert_close(replayed, launched, rtol=1e-5, atol=1e-6)
    assert len(launched[:, 0].unique()) == 10


def test_a_resumed_run_of_graphs_goes_on_as_it_would_have(device: torch.device) -> None:
    """Its first steps are launched again, with the learning rate where the graphs have it."""
    config = replace(CONFIG, cuda_graphs=True, bandit=BanditConfig("all_modules"))
    load = make_loader(device)
    whole, resumed = make_distiller(device, config, load), make_distiller(device, config, load)
    for _ in range(2):
        whole.run_round()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for _ in range(2):
        ours, theirs = resumed.run_round(), whole.run_round()
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-2, abs=1e-4)
