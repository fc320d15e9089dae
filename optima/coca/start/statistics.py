"""What a teacher does with a batch, measured on its own device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optima.coca.layers import Mlp
from optima.coca.model import CoCa


class Statistics:
    """What the teacher does with a batch.

    norms: name of a layer norm -> second moment [D + 1, D + 1] of its inputs, normalised, with a 1 behind.
    units: name of an MLP -> mean and mean square [hidden] of its activations.
    """

    def __init__(self) -> None:
        self.norms: dict[str, Tensor] = {}
        self.units: dict[str, tuple[Tensor, Tensor]] = {}

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
                self.norms[name] = x.T @ x / len(x)

            handles.append(norm.register_forward_pre_hook(hook))

        def watch_units(name: str, mlp: Mlp) -> None:
            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                x = rows(inputs[0])
                self.units[name] = (x.mean(dim=0), x.square().mean(dim=0))

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
