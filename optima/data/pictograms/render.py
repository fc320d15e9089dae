"""Draws a scene into 64 x 64 RGB pixels, on the CPU, without being the bottleneck of a training step.

Everything that can be is computed once: resized sprites, ramps for gradients, patterns, the cover's hatching. What is
left for an image is a blend of two colours and one small window per object, in integers.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from optima.data.pictograms.atlas import sprite
from optima.data.pictograms.scene import PATTERNS, SIDE, SLOPES, Scene


def render(scene: Scene) -> NDArray[np.uint8]:
    """The image as uint8 [3, 64, 64], channels red, green, blue."""
    image = _ground(scene)
    for thing in scene.things:
        ink, clear = sprite(thing.kind, thing.size)
        box = thing.box
        window = image[:, box.top : box.bottom, box.left : box.right]
        window *= clear
        window += ink
        window >>= 8
    if scene.cover is not None:
        left, top, right, bottom = scene.cover
        image[:, top:bottom, left:right] = _frame(right - left, bottom - top)
    return image.astype(np.uint8)


def _ground(scene: Scene) -> NDArray[np.uint16]:
    background = scene.background
    first, second = np.array(background.colours, dtype=np.int32).reshape(2, 3, 1, 1)
    if background.slope:
        ground: NDArray[np.int32] = first + ((second - first) * _ramps()[background.slope] >> 8)
    else:
        ground = np.broadcast_to(first, (3, SIDE, SIDE))
    if background.pattern:
        down, right = background.shift
        ground = ground + _patterns()[background.pattern, :, down : down + SIDE, right : right + SIDE]
    return ground.astype(np.uint16)


@cache
def _ramps() -> NDArray[np.int32]:
    """Gradients [SLOPES, 1, 64, 64] in 0..256, slope s > 0 rising in direction (s - 1) * 45 degrees."""
    down, right = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
    angles = (np.arange(SLOPES) - 1).reshape(-1, 1, 1) * np.pi / 4
    along = right * np.cos(angles) + down * np.sin(angles)
    reach = np.abs(along).max(axis=(1, 2), keepdims=True)
    ramps: NDArray[np.int32] = np.rint((along / reach + 1) * 128).astype(np.int32)
    return ramps[:, None]


@cache
def _patterns() -> NDArray[np.int32]:
    """Textures [PATTERNS, 1, 128, 128] within -8..8 to add to the ground: large enough to cut a window at any shift."""
    down, right = np.mgrid[0 : 2 * SIDE, 0 : 2 * SIDE]
    noise = np.random.Generator(np.random.Philox(key=7))
    patterns = np.zeros((PATTERNS, 2 * SIDE, 2 * SIDE))
    patterns[1] = noise.integers(-6, 7, size=down.shape)
    patterns[2] = np.repeat(np.repeat(noise.integers(-7, 8, size=(SIDE, SIDE)), 2, axis=0), 2, axis=1)
    patterns[3] = np.repeat(np.repeat(noise.integers(-8, 9, size=(SIDE // 2, SIDE // 2)), 4, axis=0), 4, axis=1)
    for number, period in enumerate((8, 14), start=4):
        patterns[number] = 6 * np.sign(np.sin(2 * np.pi * (right + 0.5) / period))
        patterns[number + 2] = 6 * np.sign(np.sin(2 * np.pi * (down + 0.5) / period))
        patterns[number + 4] = patterns[number] * patterns[number + 2] / 6
        patterns[number + 6] = 7 * np.sin(2 * np.pi * right / (2 * period)) * np.sin(2 * np.pi * down / (2 * period))
    patterns[12] = 7 * np.sin(2 * np.pi * (right + 2 * down) / 32)
    return np.rint(patterns).astype(np.int32)[:, None]


@cache
def _frame(width: int, height: int) -> NDArray[np.uint16]:
    """The cover [1, height, width]: grey, hatched from upper right to lower left, with a dark rim."""
    down, right = np.mgrid[0:height, 0:width]
    panel = np.where((down + right) % 6 < 3, 150, 96)
    rim = (down == 0) | (right == 0) | (down == height - 1) | (right == width - 1)
    return np.where(rim, 40, panel).astype(np.uint16)[None]
