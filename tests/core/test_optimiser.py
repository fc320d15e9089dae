"""AdamW's groups, its schedule, and clipping."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from optima_core import OptimaError, OptimiserConfig
from optima_core.optimiser import clip_gradients, make_optimiser


def learning_rates(config: OptimiserConfig, steps: int) -> list[float]:
    optimiser, schedule = make_optimiser([nn.Parameter(torch.ones(1))], config, steps)
    found = []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return [*found, optimiser.param_groups[0]["lr"]]


def test_learning_rate_rises_to_its_peak_then_falls_as_a_cosine() -> None:
    rates = learning_rates(OptimiserConfig(learning_rate=0.5, warmup=0.2, final=0.1), 20)
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[4] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.05 + 0.45 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[20] == pytest.approx(0.05)


def test_learning_rate_falls_in_a_line_or_stays() -> None:
    line = learning_rates(OptimiserConfig(learning_rate=0.5, schedule="linear", warmup=0.2, final=0.1), 20)
    assert line[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert line[12] == pytest.approx((0.5 + 0.05) / 2)
    assert line[20] == pytest.approx(0.05)
    flat = learning_rates(OptimiserConfig(learning_rate=0.5, schedule="constant", warmup=0.2), 20)
    assert flat[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert flat[4:] == [0.5] * 17


def test_a_missing_apex_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(OptimaError, match=r"apex needs NVIDIA's apex.*take adamw") as error:
        make_optimiser([nn.Parameter(torch.ones(1))], OptimiserConfig(implementation="apex"), 1)
    assert "\n" not in str(error.value)


def test_apex_is_taken_when_asked_for_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class FusedAdam(torch.optim.AdamW):
        """Apex's signature, as far as it is used."""

        def __init__(self, params: Any, lr: float, betas: tuple[float, float], adam_w_mode: bool) -> None:
            assert adam_w_mode
            super().__init__(params, lr=lr, betas=betas)

    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    matrix, gain = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    config = OptimiserConfig(implementation="apex", learning_rate=0.1, weight_decay=0.5, beta1=0.8)
    optimiser, _ = make_optimiser([matrix, gain], config, 1)
    assert isinstance(optimiser, FusedAdam)
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.5, 0.0]
    assert optimiser.param_groups[0]["betas"] == (0.8, 0.98)


def test_one_step_is_taken_at_the_peak() -> None:
    assert learning_rates(OptimiserConfig(learning_rate=0.5, warmup=0.0), 1)[0] == 0.5


def test_matrices_decay_and_the_others_do_not() -> None:
    matrix, gain = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimiser, _ = make_optimiser([matrix, gain], OptimiserConfig(learning_rate=0.1, weight_decay=0.5, warmup=0), 10)
    matrix.grad, gain.grad = torch.zeros(2, 2), torch.zeros(2)
    optimiser.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 1 - 0.1 * 0.5))
    assert torch.equal(gain.detach(), torch.ones(2))


def test_frozen_parameters_are_left_alone() -> None:
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimiser, _ = make_optimiser([frozen, nn.Parameter(torch.ones(1))], OptimiserConfig(), 1)
    assert all(frozen is not p for group in optimiser.param_groups for p in group["params"])


def test_gradients_are_clipped_jointly() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    clip_gradients(parameters, 0.0)
    assert [p.grad.item() for p in parameters if p.grad is not None] == [3.0, 4.0]
    clip_gradients(parameters, 1.0)
    assert [p.grad.item() for p in parameters if p.grad is not None] == pytest.approx([0.6, 0.8], rel=1e-4)
