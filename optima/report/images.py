"""Images inside the page: PNG files as data URIs, and where each word of a caption looked."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from optima.runs.rows import CrossAttention
from optima_core.errors import OptimaError

SPOTLIGHT_SIDE = 128
# Share of a pixel's own light that stays where a word does not look at all.
AMBIENT = 0.16


def data_uri(path: str | Path) -> str:
    """A PNG file as a data URI.

    Raises:
        OptimaError: the file is no PNG.
    """
    return _encode(_open(path))


def spotlights(attention: CrossAttention) -> list[tuple[str, str]]:
    """(word, data URI) per word: the image, lit in proportion to the word's weights, the largest at full light."""
    image = _open(attention.image)
    return [(word, spotlight(image, table)) for word, table in zip(attention.caption, attention.maps, strict=True)]


def spotlight(image: Image.Image, weights: Sequence[Sequence[float]]) -> str:
    """A data URI of the image, lit in proportion to weights over it (rows of columns), the largest at full light."""
    shown = image.convert("RGB").resize((SPOTLIGHT_SIDE, SPOTLIGHT_SIDE), Image.Resampling.NEAREST)
    table = np.asarray(weights, dtype=np.float32)
    smooth = Image.fromarray(table / max(float(table.max()), 1e-12)).resize(shown.size, Image.Resampling.BICUBIC)
    light = AMBIENT + (1 - AMBIENT) * np.clip(np.asarray(smooth), 0, 1)
    return _encode(Image.fromarray((np.asarray(shown, dtype=np.float32) * light[..., None]).astype(np.uint8)))


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError):
        raise OptimaError(f"image {path} is not a readable PNG file") from None


def _encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
