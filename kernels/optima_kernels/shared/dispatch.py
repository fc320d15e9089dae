"""Which implementation of a loss runs: "reference", "blocked" or "triton".

The choice depends on the device and on what is installed, never on a tensor's value, so it is made once while a graph
is traced and costs nothing in a compiled step.
"""

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch
from torch import Tensor

Backend = Literal["reference", "blocked", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

HAS_TRITON = find_spec("triton") is not None
# Triton reads this variable when a kernel is decorated, so it must be set before our kernels are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose_backend(backend: str | None, tensor: Tensor, loss: str, variant: Callable[[], str] | None = None) -> Backend:
    """The backend of `loss` for `tensor`'s device: what the caller named, else triton on CUDA and blocked elsewhere.

    Triton is only chosen unasked where the kernels of the variant (`optima_kernels.shared.variants`), which is only
    asked for then, or those that the loss usually takes, passed their check; see `optima_kernels.shared.selfcheck`.

    Raises ValueError when `backend` is no backend, or when it is "triton" and Triton cannot run on that device;
    RuntimeError when its interpreter cannot work with the installed numpy.
    """
    if backend is None:
        if not (HAS_TRITON and tensor.is_cuda):
            return "blocked"
        return "triton" if _is_trusted(loss, variant() if variant else "", tensor.device) else "blocked"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, not {backend!r}")
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError('backend="triton" needs the triton package, which is not installed; use backend="blocked"')
        if not runs_triton(tensor):
            raise ValueError(
                f'backend="triton" needs CUDA tensors, not {tensor.device.type} ones; use backend="blocked", or set '
                "TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
            )
        if INTERPRETED:
            check_interpreter()
    return cast(Backend, backend)


@functools.cache
def check_interpreter() -> None:
    """Raises RuntimeError where Triton's interpreter would fail in the middle of a kernel."""
    import numpy
    import triton

    versions = [tuple(int(x) for x in module.__version__.split(".")[:2]) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} needs numpy below 2.4, not {numpy.__version__}: "
            "pip install 'numpy<2.4', or triton 3.7 with the torch that goes with it"
        )


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels can be launched on the tensor."""
    return tensor.is_cuda or INTERPRETED


def _is_trusted(loss: str, variant: str, device: torch.device) -> bool:
    from optima_kernels.shared import selfcheck, variants

    return all(selfcheck.is_trusted(loss, each, device) for each in ([variant] if variant else variants.usual(loss)))


# What `torch.compiler.assume_constant_result` sets. As a decorator it would import torch's compiler, for a second and a
# half, in every process that never compiles.
_is_trusted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float32, or float64 when any of `tensors` is float64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast computes matrix products of `tensor`'s device in, None where it is off."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
