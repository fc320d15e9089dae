"""Which submodule a dotted path names: layers by number, and the nearest name where there is none."""

import difflib
from collections.abc import Sequence

from torch import nn

from optima_core.errors import OptimaError


def expand_layers(model: nn.Module, layers: str | Sequence[str]) -> list[str]:
    """Paths of existing submodules: those given, or one in which "*" stands for the numbers of a list of layers.

    Raises OptimaError, naming the nearest, if there is none.
    """
    if not isinstance(layers, str):
        found = list(layers)
    elif "*" not in layers:
        found = [layers]
    else:
        before, _, after = layers.partition("*")
        parent = before.removesuffix(".")
        numbers = [name for name, _ in find_submodule(model, parent).named_children() if name.isdecimal()]
        found = [f"{before}{number}{after}" for number in numbers]
        if not found:
            raise OptimaError(f"layers {layers!r}: {parent or 'the model'} has no numbered layers")
    for path in found:
        find_submodule(model, path)
    return found


def find_submodule(model: nn.Module, path: str) -> nn.Module:
    """The submodule of that path; "" is the model. Raises OptimaError, naming the nearest, if there is none."""
    found, place = model, ""
    for name in path.split(".") if path else ():
        children = dict(found.named_children())
        if name not in children:
            near = difflib.get_close_matches(name, children, n=1, cutoff=0.4)
            hint = f"did you mean {join_path(place, near[0])!r}?" if near else f"it has {_shown(list(children))}"
            raise OptimaError(f"path {path!r}: {place or 'the model'} has no submodule {name!r}; {hint}")
        found, place = children[name], join_path(place, name)
    return found


def join_path(path: str, part: str) -> str:
    """`part` of `path`, either of which may be ""."""
    return f"{path}.{part}" if path and part else path or part


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"
