"""A whole distillation step never waits for the device: proven without one.

Under FakeTensorMode tensors have no values, so whatever would read one (`.item()`, `bool(tensor)`, boolean indexing,
`torch.equal`) raises; and what cannot be traced as one graph does not pass `fullgraph=True`. tests/gpu runs the same
step with synchronisation forbidden.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

import optima_kernels.attention
import optima_kernels.hidden
import optima_kernels.logits
from optima.coca.pairs import module_pairs
from optima.tasks.forward import TaskForward
from optima_core import Distiller, DistillerConfig, RewardConfig
from optima_core.bandit import POLICIES
from optima_core.objective import Objective, ObjectiveConfig
from optima_kernels.shared.dispatch import INTERPRETED

sys.path.insert(0, str(Path(__file__).parent / "gpu"))  # for `from whole_step import ...` under --import-mode=importlib

from whole_step import make_coca, make_whole_step, random_batch

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
        families = importlib.import_module("optima_kernels.triton")
        for found in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
            family = importlib.import_module(found.name)
            for name in [name for name in vars(family) if name.endswith("_kernel")]:
                monkeypatch.setattr(family, name, NoLaunch())
    return str(request.param)


def run_fake_step(config: ObjectiveConfig, policy: str = "discounted_thompson", steps: int = 2) -> None:
    """Steps on tensors that have no values."""
    with FakeTensorMode():
        step = make_whole_step(config, policy=policy)
        bandit, meter = step.bandit, step.meter
        for _ in range(steps):
            loss, bandit, meter = step.run(random_batch(), bandit, meter)
            assert isinstance(loss, FakeTensor)
        assert all(isinstance(x, FakeTensor) for x in (*bandit.values(), *meter.values()))


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "mse_jsd", "relation_reverse", "mean"])
def test_a_step_reads_no_value(config: ObjectiveConfig, backend: str) -> None:
    run_fake_step(config)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_policy_reads_a_value(policy: str) -> None:
    run_fake_step(ObjectiveConfig(hidden=0.0, attention=0.0), policy, steps=1)


@pytest.mark.parametrize("source", ["probe", "training"])
def test_the_engines_round_reads_nothing_before_its_record_is_asked_for(
    source: Literal["probe", "training"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optima_core.engine.arm_names", lambda names, arms: [*names, "all"])  # read beforehand
    monkeypatch.setattr(Objective, "to", lambda self, device: self)  # fake parameters cannot be moved
    with FakeTensorMode():
        student, teacher = make_coca(16, 1, 2), make_coca(32, 2, 2).eval()
        distiller = Distiller(
            student,
            TaskForward(student, "captioning"),
            TaskForward(teacher, "captioning"),
            module_pairs(student, teacher),
            lambda step: random_batch(),
            random_batch(),
            DistillerConfig(steps_per_round=2, accumulate=2, reward=RewardConfig(source)),
        )
        distiller._arm_is_known = False  # as on any device but a CPU
        pending = [distiller.launch_round() for _ in range(3)]
        with pytest.raises(HOST_READS):
            pending[0].result()


def plant_item(self: Objective, terms: dict[str, Tensor], total: Callable[..., Tensor]) -> Tensor:
    loss = total(self, terms)
    assert loss.item() < 1e9
    return loss


def plant_branch(self: Objective, terms: dict[str, Tensor], total: Callable[..., Tensor]) -> Tensor:
    loss = total(self, terms)
    return loss if terms["task"] > 0 else 2 * loss


def plant_boolean_index(self: Objective, terms: dict[str, Tensor], total: Callable[..., Tensor]) -> Tensor:
    found = torch.stack(list(terms.values()))
    return total(self, terms) + found[found > 0].mean()


@pytest.mark.parametrize("plant", [plant_item, plant_branch, plant_boolean_index])
def test_a_planted_host_read_is_caught(plant: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    total = Objective.total
    monkeypatch.setattr(Objective, "total", lambda self, terms: plant(self, terms, total))
    with pytest.raises(HOST_READS):
        run_fake_step(ObjectiveConfig())


def test_a_step_is_one_graph(backend: str, seed: int) -> None:
    """Teacher, student, all losses and the bandit's choice in one graph, with its backward; the update in another."""
    step = make_whole_step(ObjectiveConfig())
    torch.compiler.reset()
    forward = torch.compile(step.forward, fullgraph=True, backend="aot_eager")
    reward = torch.compile(step.reward, fullgraph=True, backend="aot_eager")
    batch = random_batch()
    total, tracked, arm, bandit = forward(batch, step.bandit)
    total.backward()
    compiled = [x.grad.clone() for x in step.student.parameters() if x.grad is not None]
    step.student.zero_grad()
    bandit, _ = reward(arm, tracked, bandit, step.meter)
    assert 0 <= int(arm) < 3
    if backend == "triton":
        return  # without launches there are no values to compare
    expected, *_, expected_bandit = step.forward(batch, step.bandit)
    expected.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(compiled, [x.grad for x in step.student.parameters() if x.grad is not None])
    torch.testing.assert_close(bandit["round"], expected_bandit["round"])
