"""Activation checkpointing: the same losses and gradients from less memory, and copies that stand alone."""

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optima.coca import CoCa, CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima_core import Adaptor, LayerPaths, TorchAttention, recompute_activations
from optima_core.config import Precision
from optima_core.precision import arithmetic


def make_coca() -> tuple[CoCa, Callable[[], Tensor], Sequence[nn.Module]]:
    """With taps of one layer a module in the loss, as when it is distilled."""
    model = CoCa(
        CoCaConfig(
            embed_dim=32,
            image_encoder=ImageEncoderConfig(32, 8, 32, 6, 2, 2.0),
            text_decoder=TextDecoderConfig(40, 12, 32, 6, 2, 2.0),
            multimodal_decoder=MultimodalDecoderConfig(32, 6, 2, 2.0),
        )
    )
    images, tokens = torch.rand(4, 1, 3, 32, 32), torch.randint(1, 40, (4, 12))

    def loss() -> Tensor:
        output = model(images, tokens, {"image_encoder": (2,), "text_decoder": (5,), "multimodal_decoder": (0,)})
        taps = [tap for found in output.taps.values() for tap in found]
        shown = [x.square().mean() for tap in taps for x in (tap.hidden, tap.attention[0].q, tap.attention[-1].k)]
        return output.states.square().mean() + torch.stack(shown).sum()

    return model, loss, model.transformer_layers()


def make_adapted() -> tuple[nn.Module, Callable[[], Tensor], Sequence[nn.Module]]:
    layer = nn.TransformerEncoderLayer(32, 2, 64, 0.2, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    adaptor = Adaptor(model, {"encoder": LayerPaths("layers.*", (TorchAttention("self_attn"),))})
    x = torch.randn(4, 20, 32)

    def loss() -> Tensor:
        output, taps = adaptor.run({"encoder": (3,)}, x)
        tap = taps["encoder"][0]
        return output.square().mean() + tap.hidden.square().mean() + (tap.attention[0].q * tap.attention[0].k).mean()

    return model, loss, list(model.layers)


MODELS = {"coca": make_coca, "adapted": make_adapted}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_stay_the_same(name: str, precision: Precision, seed: int) -> None:
    model, loss, layers = MODELS[name]()

    def run() -> tuple[Tensor, list[Tensor | None]]:
        torch.manual_seed(seed)  # for dropout
        model.zero_grad()
        with arithmetic(precision, torch.device("cpu")):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    names = list(model.state_dict())
    plain, gradients = run()
    recompute_activations(layers)
    frugal, others = run()
    assert torch.equal(plain, frugal)
    for a, b in zip(gradients, others, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
    assert list(model.state_dict()) == names


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were made while it was on and are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        output = function(*arguments, **(named or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output


def peak(name: str, frugal: bool) -> int:
    """Bytes at the peak of a forward and a backward pass, without parameters and their gradients."""
    model, loss, layers = MODELS[name]()
    if frugal:
        recompute_activations(layers)
    loss().backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        loss().backward()  # type: ignore[no-untyped-call]
    return live.peak


@pytest.mark.parametrize("name", MODELS)
def test_the_peak_of_memory_is_lower(name: str) -> None:
    plain, frugal = peak(name, frugal=False), peak(name, frugal=True)
    print(f"{name}: peak of activations {plain} bytes, {frugal} with recomputation")
    assert frugal < 0.7 * plain


def test_a_copy_runs_its_own_layers(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    recompute_activations(model)
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied[0].weight)
    nn.init.zeros_(copied[0].bias)
    x = torch.randn(2, 3, requires_grad=True)
    assert not copied(x).any()
    assert model(x).any()


def test_without_gradients_nothing_is_wrapped(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    recompute_activations(model)
    monkeypatch.setattr("optima_core.recompute.checkpoint", None)
    with torch.no_grad():
        assert model(torch.ones(1, 3)).shape == (1, 3)
