"""From stored pixels to what an image encoder takes."""

from torch import Tensor


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in -1..1."""
    return images.float().div_(127.5).sub_(1.0)
