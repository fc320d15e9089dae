"""From a whole image to the square that a model sees: which part of it, and how it is resampled.

Both transforms choose a *window* of the upright image, in whole pixels, and resample it to S x S with an antialiased
filter:

- **evaluation**: the central square of the shorter side (`fit="crop"`), or the whole image, its shape lost
  (`fit="squash"`);
- **training**: a random part of the area, of a random shape (random resized crop), and, where it may, a mirror.

The window of a sample is a function of (seed, epoch, record), so it is the same for every engine, after every resume,
on any number of ranks.
"""

import math
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from optima.data.config import Interpolation, TransformConfig
from optima.data.draws import Draws
from optima.data.images import REDUCING_GAP, Header, decode
from optima.data.record import Record
from optima.task import TASKS, Task

_SIDES = re.compile(r"\b(left|right|leftmost|rightmost|clockwise|anticlockwise|counterclockwise)\b", re.IGNORECASE)


class Window(NamedTuple):
    """A part of an upright image, pixels, and whether it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    mirrored: bool = False


def mirror_allowed(task: Task, record: Record) -> bool:
    """Whether a mirrored image still fits the record: not for questions and pairs, nor beside a word for a side."""
    return TASKS[task].mirrors and not any(_SIDES.search(text) for text in record.texts)


def evaluation_window(width: int, height: int, config: TransformConfig) -> Window:
    """The window of the evaluation transform."""
    if config.fit == "squash":
        return Window(0, 0, width, height)
    side = min(width, height)
    return Window((width - side) // 2, (height - side) // 2, side, side)


def training_window(width: int, height: int, config: TransformConfig, draws: Draws, mirror: bool) -> Window:
    """A random window: its area uniform in least_area..1 of the image, its shape log-uniform, its place uniform.

    As the usual random resized crop does, it tries ten times for a window that fits, then takes the evaluation's.
    """
    mirrored = mirror and draws.chance(0.5)
    if config.least_area == 1:
        return evaluation_window(width, height, config)._replace(mirrored=mirrored)
    span = math.log(config.most_stretch)
    for _ in range(10):
        area = width * height * (config.least_area + (1 - config.least_area) * draws.unit())
        shape = math.exp(span * (2 * draws.unit() - 1))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 1 <= w <= width and 1 <= h <= height:
            return Window(draws.between(0, width - w), draws.between(0, height - h), w, h, mirrored)
    return evaluation_window(width, height, config)._replace(mirrored=mirrored)


def resample(pixels_HW3: NDArray[np.uint8], size: int, interpolation: Interpolation, mirrored: bool) -> Tensor:
    """A window's pixels, uint8 [height, width, 3], resampled to uint8 [3, size, size]."""
    image = torch.tensor(pixels_HW3).permute(2, 0, 1)[None]
    square = F.interpolate(image, (size, size), mode=interpolation, antialias=True)[0]
    return square.flip(-1) if mirrored else square


def make_square(data: bytes, header: Header, window: Window, config: TransformConfig) -> Tensor:
    """The square of a window of an encoded image, uint8 [3, S, S]. Raises Unusable if the image is damaged."""
    size = config.image_size
    # A window smaller than the gap asks for more than there is, and so keeps the image's own size.
    least = (
        math.ceil(header.height * REDUCING_GAP * size / window.height),
        math.ceil(header.width * REDUCING_GAP * size / window.width),
    )
    pixels = decode(data, header, least, reuse=True)
    across, down = pixels.shape[1] / header.width, pixels.shape[0] / header.height
    left, top = round(window.left * across), round(window.top * down)
    right = max(left + 1, round((window.left + window.width) * across))
    bottom = max(top + 1, round((window.top + window.height) * down))
    return resample(pixels[top:bottom, left:right], size, config.interpolation, window.mirrored)
