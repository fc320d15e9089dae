"""Calls of every loss at sizes that fill a GPU for a moment, and their exact answers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import optima_kernels

LOSS_SCALE = 2.0**12


class Call(NamedTuple):
    """A loss, its tensors by name (those in `trained` get gradients), and its options."""

    loss: str
    tensors: dict[str, Tensor]
    trained: tuple[str, ...]
    options: dict[str, Any]

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "Call":
        """A copy on a device, or in another floating dtype."""
        moved = {
            name: x.detach().to(device or x.device, dtype if x.is_floating_point() else None, copy=True)
            for name, x in self.tensors.items()
        }
        return self._replace(tensors=moved)

    def run(self, backend: str | None = None, wrap: Callable[..., Any] = lambda loss: loss) -> dict[str, Tensor]:
        """The loss and its gradients, times a loss scale as float16 needs one; `wrap` may compile the loss."""
        for name in self.trained:
            self.tensors[name].requires_grad_()
        value = wrap(getattr(optima_kernels, self.loss))(**self.tensors, **self.options, backend=backend)
        total = value[0] + 0.5 * value[1] if isinstance(value, tuple) else value
        gradients = torch.autograd.grad(total * LOSS_SCALE, [self.tensors[name] for name in self.trained])
        return {"loss": total.detach()} | dict(zip(self.trained, gradients, strict=True))


def attention(kind: str, masks: str, queries: int = 577, width: int = 64) -> Callable[[torch.Generator], Call]:
    def make(generator: torch.Generator) -> Call:
        shape = (2, 4, queries, width)
        tensors = {name: torch.randn(shape, generator=generator) for name in ("q_s", "k_s", "q_t", "k_t")}
        if masks == "lengths":
            tensors["key_lengths"] = torch.tensor([queries, queries // 3])
        if masks == "bool":
            tensors["mask"] = torch.rand(2, 1, queries, queries, generator=generator) < 0.8
        return Call("attention_map_loss", tensors, ("q_s", "k_s"), {"kind": kind, "causal": masks == "causal"})

    return make


def hidden(normalize: str | None, projected: bool = True) -> Callable[[torch.Generator], Call]:
    def make(generator: torch.Generator) -> Call:
        wide = 1024 if projected else 768
        tensors = {"h_s": torch.randn(2, 577, 768, generator=generator)}
        tensors["h_t"] = torch.randn(2, 577, wide, generator=generator)
        if projected:
            tensors["weight"] = torch.randn(wide, 768, generator=generator) * 768**-0.5
            tensors["bias"] = torch.randn(wide, generator=generator)
        tensors["mask"] = torch.rand(2, 577, generator=generator) < 0.9
        return Call(
            "hidden_mse", tensors, ("h_s", "weight", "bias") if projected else ("h_s",), {"normalize": normalize}
        )

    return make


def vocabulary(divergence: str, labels: bool, size: int = 8003) -> Callable[[torch.Generator], Call]:
    def make(generator: torch.Generator) -> Call:
        tensors = {}
        for side, width in (("s", 256), ("t", 384)):
            tensors[f"h_{side}"] = torch.randn(300, width, generator=generator)
            tensors[f"w_{side}"] = torch.randn(size, width, generator=generator) * width**-0.5
        tensors["mask"] = torch.rand(300, generator=generator) < 0.9
        if labels:
            tensors["labels"] = torch.randint(0, size, (300,), generator=generator)
        return Call("linear_kl", tensors, ("h_s", "w_s"), {"divergence": divergence, "temperature": 2.0})

    return make


CALLS: dict[str, Callable[[torch.Generator], Call]] = {
    "attention kl": attention("kl", "none"),
    "attention kl lengths": attention("kl", "lengths"),
    "attention kl bool": attention("kl", "bool"),
    "attention mse causal": attention("mse", "causal"),
    "attention mse wide": attention("mse", "none", 200, 128),
    "hidden plain": hidden(None),
    "hidden layernorm": hidden("layernorm"),
    "hidden l2": hidden("l2"),
    "hidden without projection": hidden("layernorm", projected=False),
    "vocabulary forward": vocabulary("forward", labels=False),
    "vocabulary reverse": vocabulary("reverse", labels=False),
    "vocabulary jsd labels": vocabulary("jsd", labels=True),
}
