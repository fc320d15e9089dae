"""What the kernel tests share: closeness, how close can be asked for, and buffers fenced by NaN."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 67


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what was expected; the plain RMS where that is zero."""
    difference = (actual.double() - expected.double()).square().mean().sqrt().item()
    size = expected.double().square().mean().sqrt().item()
    return difference / size if size > 0 else difference


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str, floor: float = 0.0) -> None:
    """Relative RMS at most `tolerance`, or an absolute RMS at most `floor` (for values that vanish by cancellation)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    difference = (actual.double() - expected.double()).square().mean().sqrt().item() if actual.numel() else 0.0
    size = expected.double().square().mean().sqrt().item() if expected.numel() else 0.0
    assert difference <= max(tolerance * size, floor), f"{what}: RMS error {difference:.3e}, RMS size {size:.3e}"


class RoundedTo(TorchDispatchMode):
    """Monte Carlo arithmetic: float64, but every result is off at random by at most one rounding to `dtype`.

    A matrix product of K terms is rounded K times, which adds up like a random walk. A log-softmax is off by what its
    row's logarithm of a sum is off, too: by a rounding of the sum, and one of the logarithm.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.unit = torch.finfo(dtype).eps / 2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return results  # a view, or in place
        is_product = func.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        unit = self.unit * (args[-1].shape[-2] ** 0.5 if is_product else 1.0)
        if isinstance(results, tuple):
            return type(results)(self._rounded(result, unit) for result in results)
        if func.overloadpacket.__name__ == "_log_softmax":
            log_sum = results.abs().amin(-1, keepdim=True)  # less the row's maximum
            results = results + self._rounded(1.0 + log_sum, unit) - (1.0 + log_sum)
        return self._rounded(results, unit)

    def _rounded(self, result: Any, unit: float) -> Any:
        if not (isinstance(result, Tensor) and result.dtype == torch.float64):
            return result
        return result * (1.0 + unit * (2.0 * torch.rand(result.shape, dtype=torch.float64) - 1.0))


def assert_agree(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    tolerance: float,
    solve: Callable[[], Mapping[str, Tensor]],
    dtype: torch.dtype,
    what: str,
    least: Mapping[str, float] | None = None,
) -> None:
    """Relative RMS of every value at most `tolerance`, or where the problem is ill-conditioned an error at most
    `rounding_errors`, or one that `least` has for it; `solve` computes `exact` anew."""
    assert actual.keys() == exact.keys()
    if any(relative_rms(actual[name], exact[name]) > tolerance for name in exact):
        floors = rounding_errors(solve, exact, dtype)
    else:
        floors = dict.fromkeys(exact, torch.finfo(torch.float64).eps)  # where `exact` is 0
    for name in exact:
        floor = max(floors[name], (least or {}).get(name, 0.0))
        assert_close(actual[name], exact[name], tolerance, f"{name}, {what}", floor=floor)


def rounding_errors(
    solve: Callable[[], Mapping[str, Tensor]], exact: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """The RMS error that rounding every result to `dtype` may leave in each value that `solve` computes in float64.

    Four times the largest of eight samples of what single roundings do to it; at least the spacing of `dtype` around
    zero, and the rounding of terms of size 1 in `exact` itself.
    """
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    errors = dict.fromkeys(exact, max(spacing, torch.finfo(torch.float64).eps))
    for _ in range(8):
        with RoundedTo(dtype):
            sample = solve()
        for name, value in exact.items():
            error = (sample[name] - value).square().mean().sqrt().item()
            errors[name] = max(errors[name], 4.0 * error)
    return errors


class Fenced:
    """A tensor inside a larger buffer of NaN: a read past its end poisons the result, a write past it is seen."""

    def __init__(self, tensor: Tensor) -> None:
        fill = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
        self.buffer = torch.full((tensor.numel() + 2 * GUARD,), fill, dtype=tensor.dtype, device=tensor.device)
        self.tensor = self.buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        self.tensor.copy_(tensor)
        self.before = self.buffer.clone()

    def assert_untouched(self, what: str) -> None:
        """The buffer, tensor and guard bands alike, still holds the bits it was made with."""
        same = torch.equal(self.buffer.view(torch.uint8), self.before.view(torch.uint8))
        assert same, f"{what}: the input or its guard band was written"
