"""What a call of torch takes in memory at its peak, without a device: tensors that lie nowhere have sizes, too.

    peak_bytes(lambda: loss(h_s, w_s).backward())  # h_s and w_s on the meta device

Counted are the elements that are alive at a time; an allocator rounds up, and a vendor's products have workspaces.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that were alive at a time during `call`, beside what was there before it; results count."""
    alive = _Alive()
    with alive:
        kept = call()
    del kept
    return alive.peak


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operators make, and takes them off when nobody holds them any more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.bytes: int = 0
        self.peak: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._meet((args, kwargs), made=False)
        result = func(*args, **kwargs or {})
        self._meet(result, made=True)
        return result

    def _meet(self, values: Any, made: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if id(storage) not in self.sizes:
                    self.sizes[id(storage)] = size = storage.nbytes() if made else 0
                    self.bytes += size
                    weakref.finalize(storage, self._forget, id(storage))
        self.peak = max(self.peak, self.bytes)

    def _forget(self, storage: int) -> None:
        self.bytes -= self.sizes.pop(storage)
