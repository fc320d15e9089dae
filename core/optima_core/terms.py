"""What the losses of a step are called: inside the engine by kind and module, in records by kind, module and layer."""

from collections.abc import Iterable
from functools import cache
from typing import Literal, NamedTuple, cast, get_args

LossKind = Literal["task", "logits", "hidden", "attention"]
LAYER_KINDS: tuple[LossKind, ...] = ("hidden", "attention")
"""The losses that a module has, one of each a layer."""


class LossTerm(NamedTuple):
    """One loss of a record. module, layer (the student's, from 0): None but for a layer loss."""

    kind: LossKind
    module: str | None = None
    layer: int | None = None

    @property
    def name(self) -> str:
        """As records have it: "task", "logits", "hidden/<module>/<layer>", "attention/<module>/<layer>"."""
        return self.kind if self.module is None else f"{self.kind}/{self.module}/{self.layer}"

    @classmethod
    def parse(cls, name: str) -> "LossTerm":
        """The inverse of `name`.

        Raises ValueError if it is none.
        """
        kind, *place = name.split("/")
        of_layer = kind in ("hidden", "attention")
        fits = len(place) == 2 and place[0] and place[1].isdecimal() if of_layer else not place
        if kind not in get_args(LossKind) or not fits:
            raise ValueError(f"a loss is named task, logits or (hidden or attention)/MODULE/LAYER, got {name!r}")
        known = cast(LossKind, kind)
        return cls(known, place[0], int(place[1])) if of_layer else cls(known)


class LossGroup(NamedTuple):
    """Losses that are one tensor: [layers] where there are layers, otherwise 0-d.

    module, layers (the student's, in order): of layer losses of one kind.
    """

    kind: LossKind
    module: str | None = None
    layers: tuple[int, ...] = ()


@cache
def record_order(groups: tuple[LossGroup, ...]) -> tuple[tuple[LossTerm, LossGroup, int], ...]:
    """The losses of the groups as records list them, with the group and the place in its tensor.

    Those without a module come first; then, module by module, layer by layer, the losses of a layer.
    """
    single = [(LossTerm(group.kind), group, 0) for group in groups if group.module is None]
    modules = dict.fromkeys(group.module for group in groups if group.module is not None)
    return (*single, *(found for module in modules for found in _layer_by_layer(module, groups)))


def _layer_by_layer(module: str, groups: Iterable[LossGroup]) -> list[tuple[LossTerm, LossGroup, int]]:
    own = [group for group in groups if group.module == module]
    layers = sorted({layer for group in own for layer in group.layers})
    return [
        (LossTerm(group.kind, module, layer), group, group.layers.index(layer))
        for layer in layers
        for group in own
        if layer in group.layers
    ]
