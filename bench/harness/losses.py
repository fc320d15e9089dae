"""Contests of losses: contenders make a scalar of the same inputs, and must give the same gradients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.harness.contest import Bar, Contest, Run, Work

Loss = Callable[..., Tensor]
"""Of the inputs, a scalar."""


class Ours(Protocol):
    """Makes our loss, of a backend, behind a gate: a number, 0 or 1."""

    def __call__(self, backend: str | None = None, gate: float | None = None) -> Loss: ...


def draws(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Normal numbers of a shape, scaled by `std`: the same ones in the same order every time."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    return normal


def dtype_of(device: torch.device) -> torch.dtype:
    """In which losses are measured: float32 on a CPU, bfloat16 elsewhere."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def by_layer(loss: Loss) -> Loss:
    """Of lists with an entry a layer: the sum of the loss of each."""
    return lambda *sides: torch.stack([loss(*layer) for layer in zip(*sides, strict=True)]).sum()


@dataclass(frozen=True)
class LossContest:
    """Contenders over the same inputs.

    Attributes:
        device: Where they are measured.
        inputs: Makes the arguments of every loss, the same ones at every call.
        trained: Of the arguments, the tensors whose gradients count.
        values: Whether losses, too, must agree: some peers differ by a constant.
    """

    device: torch.device
    inputs: Callable[[], Sequence[Any]]
    trained: Callable[[Sequence[Any]], Sequence[Tensor]]
    values: bool = False
    bars: Mapping[str, float] = field(default_factory=dict)

    def of(self, make: Callable[[], Loss]) -> Callable[[], Run]:
        """The contender of a loss."""

        def prepare() -> Run:
            loss = make()

            def run() -> Sequence[Tensor]:
                inputs = self.inputs()
                total = loss(*inputs)
                gradients = torch.autograd.grad(total, self.trained(inputs))
                return (total.detach(), *gradients) if self.values else gradients

            return run

        return prepare

    def contest(
        self,
        suite: str,
        name: str,
        eager: Callable[[], Loss],
        ours: Ours,
        peers: Mapping[str, Callable[[], Loss]],
        *,
        runs: Mapping[str, Callable[[], Run]] | None = None,
        bars: Sequence[Bar] = (),
        work: Work | None = None,
        rounds: int = 5,
        variants: bool = True,
        rounded: bool = False,
    ) -> Contest:
        """Eager torch first, ours, the peers, and `runs`, contenders that are no losses; on a GPU our variants.

        bars: beside those of `self.bars`, the shares of eager's time or memory that ours may take. rounded: contenders
        compute in 16 bits, as they do on a GPU.
        """
        contenders = {"eager": self.of(eager), "optima": self.of(ours)}
        contenders |= {peer: self.of(make) for peer, make in peers.items()} | dict(runs or {})
        on_cpu = self.device.type == "cpu"
        if variants and not on_cpu:
            contenders["optima, blocked"] = self.of(partial(ours, backend="blocked"))
            contenders["optima, gate open"] = self.of(partial(ours, gate=1.0))
            contenders["optima, gate closed"] = self.of(partial(ours, gate=0.0))
        return Contest(
            suite=suite,
            name=name,
            contenders=contenders,
            unequal=("optima, gate closed",),
            tolerance=5e-2 if rounded or (variants and not on_cpu) else 1e-4,
            rounds=rounds,
            bars=(*bars, *(Bar("optima", "eager", quantity, most) for quantity, most in self.bars.items())),  # type: ignore[arg-type]
            work=work,
        )
