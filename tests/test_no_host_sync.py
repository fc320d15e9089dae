"""A whole distillation step never waits for the device: proven without one.

The step is the engine's own (`optima_core.Step`), with gates, clipping, optimiser, scaler, schedule and average; the
policy chooses before it and learns after it. Under FakeTensorMode tensors have no values, so whatever would read one
(`.item()`, `bool(tensor)`, boolean indexing, `torch.equal`) raises; what cannot be traced as one graph does not pass
`fullgraph=True`. tests/gpu runs the same step with synchronisation forbidden.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from whole_step import make_coca, make_whole_step, random_batch

import optima_kernels.attention
import optima_kernels.hidden
import optima_kernels.logits
from optima.coca.pairs import module_pairs
from optima.tasks.batches import TaskBatch
from optima.tasks.forward import TaskForward
from optima_core import BanditConfig, Distiller, DistillerConfig, ObjectiveConfig, RewardConfig
from optima_core.bandit import POLICIES
from optima_core.objective import Losses, Objective, as_vector
from optima_core.records import Sent
from optima_core.terms import LossGroup
from optima_kernels.shared.dispatch import INTERPRETED

HOST_READS = (DataDependentOutputException, DynamicOutputShapeException)
CONFIGS = [
    ObjectiveConfig(),
    ObjectiveConfig(attention_kind="mse", normalize=None, divergence="jsd"),
    ObjectiveConfig(attention_heads="relation", relation_heads=4, normalize="l2", divergence="reverse"),
    ObjectiveConfig(attention_heads="mean"),
]


class NoLaunch:
    """A kernel whose launch is left out: what is under test is the host's side of it."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        assert all(isinstance(size, int) for size in grid), "a grid that depends on a value"
        return lambda **arguments: None


@pytest.fixture(params=["blocked", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that every loss takes; of triton, all but the launches."""
    for module in (optima_kernels.attention, optima_kernels.hidden, optima_kernels.logits):
        monkeypatch.setattr(module, "choose_backend", lambda *_: request.param)
    if request.param == "triton":
        pytest.importorskip("triton")
        if not INTERPRETED:
            pytest.skip("host code of the triton backend asks a CUDA device for its architecture; see tests/gpu")
        for name in ("attention", "hidden", "logits"):
            importlib.import_module(f"optima_kernels.{name}.triton")
        importlib.import_module("optima_kernels.shared.scaling")
        for module in [m for name, m in sys.modules.items() if name.startswith("optima_kernels.")]:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, NoLaunch())
    return str(request.param)


def run_fake_step(config: DistillerConfig, steps: int = 2) -> None:
    """Steps on tensors that have no values."""
    with FakeTensorMode():
        whole = make_whole_step(config)
        bandit, meter = whole.bandit, whole.meter
        for _ in range(steps):
            loss, bandit, meter = whole.run(random_batch(), bandit, meter)
            assert isinstance(loss, FakeTensor)
        assert all(isinstance(x, FakeTensor) for x in (*bandit.values(), *meter.values()))


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "mse_jsd", "relation_reverse", "mean"])
def test_a_step_reads_no_value(config: ObjectiveConfig, backend: str) -> None:
    run_fake_step(DistillerConfig(objective=config, ema=0.9))


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "mse_jsd", "relation_reverse", "mean"])
def test_a_step_sends_no_number_to_the_device(
    config: ObjectiveConfig, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a GPU's host waits for, too, and no fake tensor sees."""

    def refuse(*arguments: Any, **named: Any) -> Tensor:
        raise AssertionError("a number was sent to the device")

    with FakeTensorMode():
        whole, batch = make_whole_step(DistillerConfig(objective=config, ema=0.9)), random_batch()
        _, bandit, meter = whole.run(batch, whole.bandit, whole.meter)
        for owner, name in ((torch, "as_tensor"), (torch, "tensor"), (Tensor, "new_tensor")):
            monkeypatch.setattr(owner, name, refuse)
        whole.run(batch, bandit, meter)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_policy_reads_a_value(policy: str) -> None:
    objective = ObjectiveConfig(hidden=0.0, attention=0.0)
    run_fake_step(DistillerConfig(objective=objective, bandit=BanditConfig(policy)), steps=1)


def make_fake_distiller(config: DistillerConfig) -> Distiller[TaskBatch]:
    student, teacher = make_coca(16, 1, 2), make_coca(32, 2, 2).eval()
    forwards = (TaskForward(model, "captioning") for model in (student, teacher))
    return Distiller(
        student,
        *forwards,
        module_pairs(student, teacher, single_layer_maps=True),
        lambda step: random_batch(),
        random_batch(),
        replace(config, teacher_ahead=False),  # of CPUs alone, and fake tensors are those of one thread
    )


@pytest.mark.parametrize("source", ["probe", "training"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_engine_reads_nothing_but_records_if_it_is_not_to_read_the_arm(
    source: Literal["probe", "training"], precision: Literal["fp32", "bf16", "fp16"]
) -> None:
    config = DistillerConfig(steps_per_round=2, accumulate=2, precision=precision, ema=0.9, read_arm=False)
    with FakeTensorMode():
        distiller = make_fake_distiller(replace(config, reward=RewardConfig(source)))
        pending = [distiller.launch_round() for _ in range(3)]
        with pytest.raises(HOST_READS):
            pending[0].result()


@pytest.mark.parametrize("source", ["probe", "training"])
def test_the_engine_reads_the_arm_once_a_round(
    source: Literal["probe", "training"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it reads is made up here, since fake tensors have no values; all else would raise."""
    reads: list[int] = []

    def told(sent: Sent) -> Tensor:
        reads.append(distiller.round)
        assert sent._value.shape == (3,)
        with unset_fake_temporarily():
            return torch.tensor([0.0, 1.0, 0.0])

    with FakeTensorMode():
        distiller = make_fake_distiller(DistillerConfig(steps_per_round=2, reward=RewardConfig(source)))
        monkeypatch.setattr(Sent, "value", told)
        for _ in range(3):
            distiller.launch_round()
    assert reads == [0, 1, 2]


def plant_item(self: Objective, losses: Losses, total: Callable[..., Tensor]) -> Tensor:
    loss = total(self, losses)
    assert loss.item() < 1e9
    return loss


def plant_branch(self: Objective, losses: Losses, total: Callable[..., Tensor]) -> Tensor:
    loss = total(self, losses)
    return loss if losses[LossGroup("task")] > 0 else 2 * loss


def plant_boolean_index(self: Objective, losses: Losses, total: Callable[..., Tensor]) -> Tensor:
    found = torch.cat([values.flatten() for values in losses.values()])
    return total(self, losses) + found[found > 0].mean()


@pytest.mark.parametrize("plant", [plant_item, plant_branch, plant_boolean_index])
def test_a_planted_host_read_is_caught(plant: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    total = Objective.total
    monkeypatch.setattr(Objective, "total", lambda self, losses: plant(self, losses, total))
    with pytest.raises(HOST_READS):
        run_fake_step(DistillerConfig())


def test_counts_of_several_ranks_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of the host's that is copied to a device is waited for; one that the device fills in is not."""
    student, teacher = make_coca(16, 1, 2), make_coca(32, 2, 2).eval()
    objective = Objective(
        module_pairs(student, teacher, single_layer_maps=True), ObjectiveConfig(), weigh=torch.ones_like
    )
    wanted, wanted_of_teacher = objective.wanted(list(objective.pairs))
    batch = random_batch()
    shown, taught = (
        TaskForward(model, "captioning")(batch, taps)
        for model, taps in ((student, wanted), (teacher, wanted_of_teacher))
    )

    def refuse(*arguments: Any, **named: Any) -> Tensor:
        raise AssertionError("a number was copied to the device")

    for name in ("as_tensor", "tensor"):
        monkeypatch.setattr(torch, name, refuse)
    objective(shown, taught, dict.fromkeys(objective.pairs))


def test_a_step_is_one_graph(backend: str, seed: int) -> None:
    """Teacher, student, all losses and the bandit's choice in one graph, with its backward; the update in another."""
    whole = make_whole_step(DistillerConfig(bandit=BanditConfig()))
    torch.compiler.reset()
    forward = torch.compile(whole.forward, fullgraph=True, backend="aot_eager")
    reward = torch.compile(whole.reward, fullgraph=True, backend="aot_eager")
    batch, student = random_batch(), whole.step.student
    losses, _, arm, bandit = forward(batch, whole.bandit)
    total = whole.step.backward(losses)
    compiled = [x.grad.clone() for x in student.parameters() if x.grad is not None]
    student.zero_grad()
    bandit, _ = reward(arm, as_vector(losses).values, bandit, whole.meter)
    assert 0 <= int(arm) < 3
    if backend == "triton":
        return  # without launches there are no values to compare
    expected, *_, expected_bandit = whole.forward(batch, whole.bandit)
    torch.testing.assert_close(total, whole.step.backward(expected))
    torch.testing.assert_close(compiled, [x.grad for x in student.parameters() if x.grad is not None])
    torch.testing.assert_close(bandit["round"], expected_bandit["round"])
