"""The emoji bitmaps, resized once per kind and size and kept ready for blending."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from optima.data.pictograms.kinds import KINDS

CELL = 64
"""Side of an atlas cell in pixels."""
COLUMNS = 8
"""Cells in a row of the atlas."""
SMALLEST, LARGEST = 14, 28
"""Length in pixels of an object's longer side, both ends included."""


class Sprite(NamedTuple):
    """A kind's bitmap at one size, prepared so that `(under * clear + ink) >> 8` blends it in."""

    ink: NDArray[np.uint16]  # [3, height, width], colour times opacity, 0..65280
    clear: NDArray[np.uint16]  # [1, height, width], 256 = the background shows fully


@cache
def _glyphs() -> list[Image.Image]:
    """Every kind's glyph, cropped to its ink, 64 pixels on the longer side."""
    atlas = Image.open(Path(__file__).with_name("atlas.png")).convert("RGBA")
    glyphs = []
    for number in range(len(KINDS)):
        left, top = number % COLUMNS * CELL, number // COLUMNS * CELL
        cell = atlas.crop((left, top, left + CELL, top + CELL))
        glyphs.append(cell.crop(cell.getchannel("A").getbbox()))
    return glyphs


@cache
def extent(kind: int, size: int) -> tuple[int, int]:
    """Width and height in pixels of a kind whose longer side is `size` pixels."""
    width, height = _glyphs()[kind].size
    scale = size / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


@cache
def sprite(kind: int, size: int) -> Sprite:
    """The kind's bitmap with a longer side of `size` pixels."""
    glyph = _glyphs()[kind].resize(extent(kind, size), Image.Resampling.LANCZOS)
    rgba = np.asarray(glyph, dtype=np.float32).transpose(2, 0, 1)
    alpha = rgba[3:] * (256 / 255)
    ink = np.rint(rgba[:3] * alpha).clip(0, 65280).astype(np.uint16)
    clear = (256 - np.rint(alpha)).astype(np.uint16)
    return Sprite(ink, np.minimum(clear, (65535 - ink.max(axis=0, keepdims=True)) // 255).astype(np.uint16))
