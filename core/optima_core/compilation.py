"""What `compile` makes graphs of: of one process's step a single one, of several ranks' models one a layer.

Ranks fetch shards and exchange gradients a layer at a time, while other layers are computed. One graph would ask for
everything at its beginning, and hand out all gradients at its end. So there layers are graphs, each between two
exchanges, and what is left, with the fused losses, runs as it is.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from optima_core.errors import OptimaError

SHAPES = 64
"""Most graphs of one layer class: layers of one width share theirs, those of other widths or lengths do not."""

_in_use: ContextVar[bool] = ContextVar("layers_are_graphs", default=False)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The members of every nn.ModuleList in the module that run when called, outer ones first.

    A list of lists, or of bare projections, has none.
    """
    return [
        layer
        for found in module.modules()
        if isinstance(found, nn.ModuleList)
        for layer in found
        if not isinstance(layer, nn.ModuleList | nn.ModuleDict | nn.Linear)
    ]


def compile_layers(module: nn.Module) -> None:
    """Makes each layer of the module, in place, one that runs as a graph within `layers_as_graphs`.

    To be called before parameters are sharded, whose exchange then stays outside the graphs. Weights and their names
    stay as they are.
    """
    inner: set[nn.Module] = set()
    for layer in layers_of(module):
        if layer not in inner:
            layer.forward = _Compiled(layer.forward)
            inner |= {*layer.modules()}


class _Compiled:
    """A layer's forward: a graph where those are in use, otherwise as it was."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.graph = torch.compile(forward, fullgraph=True)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (self.graph if _in_use.get() else self.forward)(*arguments, **named)

    def __deepcopy__(self, known: dict[int, Any]) -> "_Compiled":
        return _Compiled(deepcopy(self.forward, known))  # of the copied layer


@contextlib.contextmanager
def layers_as_graphs() -> Iterator[None]:
    """Within, layers that `compile_layers` was given run as graphs; raises as `told_in_a_line` does."""
    token = _in_use.set(True)
    try:
        # A layer's graph is not to be cut into the buckets of DDP: it is smaller than one.
        with torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=SHAPES), told_in_a_line("a layer does"):
            yield
    finally:
        _in_use.reset(token)


@contextlib.contextmanager
def told_in_a_line(what: str = "teacher, student and losses do") -> Iterator[None]:
    """What cannot be compiled ends in a page of advice, of which an OptimaError's one line says what it was."""
    try:
        yield
    except torch._dynamo.exc.Unsupported as error:
        lines = [line.strip() for line in str(error).splitlines()]
        context = [line.partition(":")[2].strip() for line in lines if line.startswith("Developer debug context")]
        raise OptimaError(
            f"compile: {what} not make one graph ({lines[0]}: {' '.join(context)}); take compile: false"
        ) from error
