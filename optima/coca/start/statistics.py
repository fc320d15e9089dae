"""What a teacher does with a batch, or with one batch after another, measured on its own device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optima.coca.layers import Mlp
from optima.coca.model import CoCa


class Statistics:
    """What the teacher does with the batches that were watched; every row of tokens counts the same.

    norms: name of a layer norm -> second moment [D + 1, D + 1] of its inputs, normalised, with a 1 behind.
    units: name of an MLP -> mean and mean square [hidden] of its activations.
    """

    def __init__(self) -> None:
        self.norms: dict[str, Tensor] = {}
        self.units: dict[str, tuple[Tensor, Tensor]] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def watching(self, model: CoCa, valid: Tensor) -> Iterator[None]:
        """Counts while the block runs; rows of text as long as `valid` [rows, L] (CLS aside) count where it is True."""

        def rows(x: Tensor) -> Tensor:
            for counted in (valid, nn.functional.pad(valid, (0, 1), value=True)):
                if x.shape[:-1] == counted.shape:
                    return x[counted].double()
            return x.flatten(0, -2).double()

        def watch_norm(name: str, norm: nn.LayerNorm) -> None:
            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                x = nn.functional.layer_norm(rows(inputs[0]), norm.normalized_shape, eps=norm.eps)
                x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
                self.norms[name] = _mean(self.norms.get(name), x.T @ x / len(x), self._share(name, len(x)))

            handles.append(norm.register_forward_pre_hook(hook))

        def watch_units(name: str, mlp: Mlp) -> None:
            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                x = rows(inputs[0])
                share = self._share(name, len(x))
                mean, square = self.units.get(name, (None, None))
                self.units[name] = _mean(mean, x.mean(dim=0), share), _mean(square, x.square().mean(dim=0), share)

            handles.append(mlp[2].register_forward_pre_hook(hook))

        handles: list[torch.utils.hooks.RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                watch_norm(name, module)
            elif isinstance(module, Mlp):
                watch_units(name, module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _share(self, name: str, rows: int) -> float:
        """Of all rows seen there, these among them, the share that these are."""
        self._counts[name] = self._counts.get(name, 0) + rows
        return rows / self._counts[name]


def _mean(before: Tensor | None, found: Tensor, share: float) -> Tensor:
    """A running mean after some more rows, which are `share` of all."""
    return found if before is None else before + (found - before) * share
