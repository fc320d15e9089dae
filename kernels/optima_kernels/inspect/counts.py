"""What a Triton launch reads, writes and computes, counted in Triton's interpreter.

    with counting() as launches:
        hidden_mse(h_s, h_t, backend="triton")
    launches[0].moved / launches[0].floor

A counter that no GPU's clock can blur: bytes loaded and stored by argument, how many of them are different bytes,
multiply-adds of matrix products, and exponentials. `tilings_of("sm_90")` has the kernels cut as they are there. Needs
TRITON_INTERPRET=1 before the first import.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from optima_kernels.shared import target

OUTSIDE = "outside of every argument"


@dataclass
class Launch:
    """One kernel's launch. Bytes are by argument; arguments that share memory share a name, joined by "/".

    `loaded` and `stored` count every access, those that a cache would answer too; `read` and `written` the different
    bytes among them, what must move if a cache answers all the rest. `flops` are those of matrix products, two a
    multiply-add, `exps` exponentials of either base; both include lanes that are masked.
    """

    kernel: str
    programs: int = 0
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    exps: int = 0

    @property
    def moved(self) -> int:
        """Bytes of all accesses."""
        return self.loaded.total() + self.stored.total()

    @property
    def floor(self) -> int:
        """Bytes when each is read once and written once."""
        return self.read.total() + self.written.total()


class _Memory:
    """The arguments of a launch by address, and which of their bytes were touched."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        extents: dict[tuple[int, int], list[str]] = {}
        for name, value in arguments.items():
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.numel():
                    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                    start = tensor.data_ptr()
                    extents.setdefault((start, start + (last + 1) * tensor.element_size()), []).append(name)
        self.extents = [(start, end, "/".join(names)) for (start, end), names in sorted(extents.items())]
        self.touched = {kind: [np.zeros(end - start, bool) for start, end, _ in self.extents] for kind in ("r", "w")}

    def access(self, kind: str, addresses: Any, size: int) -> Iterator[tuple[str, int]]:
        """Marks elements of `size` bytes; yields bytes by argument."""
        left = addresses
        for (start, end, name), touched in zip(self.extents, self.touched[kind], strict=True):
            inside = (left >= start) & (left < end)
            found = left[inside]
            if found.size:
                touched[found - start] = True
                yield name, found.size * size
                left = left[~inside]
            if not left.size:
                return
        yield OUTSIDE, left.size * size

    def different(self, kind: str, sizes: dict[str, int]) -> Counter[str]:
        bytes_of: Counter[str] = Counter()
        for (_, _, name), touched in zip(self.extents, self.touched[kind], strict=True):
            bytes_of[name] += int(touched.sum()) * sizes.get(name, 0)
        return +bytes_of


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Every launch from here to the end of the block, in order."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launches: list[Launch] = []
    current: list[tuple[Launch, _Memory, dict[str, int]]] = []
    originals = {name: getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store")}
    originals |= {name: getattr(InterpreterBuilder, name) for name in ("create_dot", "create_exp", "create_exp2")}
    initialise, launch = GridExecutor._init_args_hst, GridExecutor.__call__

    def access(kind: str, pointers: Any, mask: Any) -> None:
        counted, memory, sizes = current[-1]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.asarray(pointers.data)[np.asarray(mask.data, bool)].astype(np.int64)
        for name, moved in memory.access(kind, addresses, size):
            (counted.loaded if kind == "r" else counted.stored)[name] += moved
            sizes[name] = size

    def load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        access("r", pointers, mask)
        return originals["create_masked_load"](builder, pointers, mask, *rest)

    def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        access("w", pointers, mask)
        return originals["create_masked_store"](builder, pointers, value, mask, *rest)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        current[-1][0].flops += 2 * a.data.size * b.data.shape[-1]
        return originals["create_dot"](builder, a, b, *rest)

    def exponential(name: str) -> Callable[..., Any]:
        def counted(builder: Any, argument: Any) -> Any:
            current[-1][0].exps += argument.data.size
            return originals[name](builder, argument)

        return counted

    def on_host(executor: Any, positional: Any, named: dict[str, Any]) -> Any:
        hosts = initialise(executor, positional, named)
        arguments = dict(zip(executor.arg_names, hosts[0], strict=False)) | hosts[1]
        current.append((Launch(executor.fn.__name__, int(np.prod(executor.grid))), _Memory(arguments), {}))
        return hosts

    def run(executor: Any, *positional: Any, **named: Any) -> Any:
        result = launch(executor, *positional, **named)
        counted, memory, sizes = current.pop()
        counted.read, counted.written = memory.different("r", sizes), memory.different("w", sizes)
        launches.append(counted)
        return result

    with ExitStack() as stack:
        for name, hook in {"create_masked_load": load, "create_masked_store": store, "create_dot": dot}.items():
            stack.enter_context(patch.object(InterpreterBuilder, name, hook))
        for name in ("create_exp", "create_exp2"):
            stack.enter_context(patch.object(InterpreterBuilder, name, exponential(name)))
        stack.enter_context(patch.object(GridExecutor, "_init_args_hst", on_host))
        stack.enter_context(patch.object(GridExecutor, "__call__", run))
        yield launches


@contextmanager
def tilings_of(name: str) -> Iterator[None]:
    """Interpreted launches in this block are cut as they are on the target `name`, "sm_90" or the like."""
    with patch.object(target, "INTERPRETED", False), patch.object(target, "architecture", lambda device: name):
        yield
