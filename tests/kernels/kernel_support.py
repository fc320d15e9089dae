"""What the kernel tests share: closeness, and buffers fenced by NaN."""

import torch
from torch import Tensor

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
