"""Layers that are compiled one by one: the same outputs and gradients, and graphs only where those are wanted."""

import copy
from functools import partial

import pytest
import torch
from plain_models import TwoModules, load
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from optima_core import LayerTap, LogitPrediction, OptimaError, WantedTaps
from optima_core.compilation import compile_layers, layers_as_graphs

WANTED: WantedTaps = {"front": (0, 1), "back": (0,)}


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def shown(model: TwoModules) -> list[Tensor]:
    """Every output of the model, and all gradients of their sum."""
    output = model(load(0), WANTED)
    assert isinstance(output.prediction, LogitPrediction)
    found = [output.task_loss, output.prediction.logits]
    for tap in (tap for taps in output.taps.values() for tap in taps):
        assert isinstance(tap, LayerTap)
        found += [tap.hidden, tap.attention[0].q, tap.attention[0].k]
    gradients = torch.autograd.grad(sum(x.square().sum() for x in found), list(model.parameters()))
    return [*found, *gradients]


def test_compiled_layers_show_and_learn_what_they_did(seed: int, counter: CompileCounterWithBackend) -> None:
    model = TwoModules(8, 2, 1)
    expected, names = shown(model), list(model.state_dict())
    compile_layers(model)
    assert list(model.state_dict()) == names
    assert counter.frame_count == 0
    for _ in range(2):
        with layers_as_graphs():
            found = shown(model)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1, "three layers of the same sizes share a graph"


def test_outside_layers_run_as_they_were(seed: int, counter: CompileCounterWithBackend) -> None:
    model = TwoModules(8, 2, 1)
    expected = shown(model)
    compile_layers(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(shown(model), expected, strict=True))
    assert counter.frame_count == 0


def test_a_copy_runs_its_own_layers(seed: int, counter: CompileCounterWithBackend) -> None:
    model = TwoModules(8, 2, 1)
    compile_layers(model)
    other = copy.deepcopy(model)
    expected = shown(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with layers_as_graphs():
        for ours, theirs in zip(shown(other), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_compiled_is_told_in_a_line(counter: CompileCounterWithBackend) -> None:
    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print(x)
            return x

    model = nn.Sequential(nn.ModuleList([Reading()]))
    compile_layers(model)
    told = r"compile: a layer does not make one graph .*print.*; take compile: false"
    with pytest.raises(OptimaError, match=told) as error, layers_as_graphs():
        model[0][0](torch.ones(2))  # type: ignore[index]
    assert "\n" not in str(error.value)
