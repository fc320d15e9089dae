"""Arguments of a loss of several layers."""

from collections.abc import Sequence

from torch import Tensor

PerLayer = Tensor | Sequence[Tensor | None] | None
"""One tensor for all layers, or one entry a layer."""


def per_layer(argument: PerLayer, layers: int) -> Sequence[Tensor | None]:
    """One entry a layer from an argument that is a sequence already, or one tensor (or None) for all layers."""
    return [argument] * layers if argument is None or isinstance(argument, Tensor) else argument
