"""The running average beside torch's own, and what it asks of the device."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from optima_core.average import RunningAverage


def step(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    model(torch.randn(8, 3))


def test_it_is_torchs_average_bit_for_bit(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    ours = RunningAverage(model, 0.8)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))  # type: ignore[no-untyped-call]
    for _ in range(6):
        step(model)
        ours.update(model)
        theirs.update_parameters(model)
    for name, tensor in theirs.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], tensor), name


def test_a_loaded_average_goes_on(seed: int) -> None:
    model = nn.Linear(3, 5)
    whole = RunningAverage(model, 0.8)
    step(model)
    whole.update(model)
    resumed = RunningAverage(model, 0.8)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    step(model)
    for average in (whole, resumed):
        average.update(model)
    assert torch.equal(whole.module.weight, resumed.module.weight)  # type: ignore[arg-type]


def test_it_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values to read; and nothing is moved between devices, which would wait, too."""
    with FakeTensorMode():
        model = nn.Linear(3, 5)
        average = RunningAverage(model, 0.8)

        def refuse(*arguments: object, **named: object) -> None:
            raise AssertionError("a tensor was moved")

        monkeypatch.setattr(torch.Tensor, "to", refuse)
        for _ in range(3):
            average.update(model)
