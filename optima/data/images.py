"""Encoded images to pixels: what is taken, how it is decoded, and what is refused.

An image is looked at in two steps. `inspect` reads the header and refuses what no decoder should be given: nothing,
no image, a decompression bomb, an animation (GIF, PNG or WebP of several frames, a TIFF of several pages: which frame
a caption is about, nobody has said). `decode` makes upright 8-bit RGB of the rest, and refuses what breaks on
the way. Nothing is guessed: a JPEG that ends early, or with a hole in it, or a PNG with rows missing, is refused, not
filled with grey (Pillow, where simplejpeg is missing, does not notice holes).

JPEGs, nearly all there is, go through libjpeg-turbo (simplejpeg) if it is installed, which also scales large ones down
while it decodes; all else, CMYK and 16-bit images among it, through Pillow. Grey becomes RGB, EXIF's orientation is
applied, 16 bits are scaled to 8, transparency is dropped (as `Image.convert("RGB")` does in published pipelines).
"""

import contextlib
import io
import re
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from optima.data.png import refuse_missing_rows
from optima.data.record import Unusable
from optima.limits import MAX_DECODED_BYTES, MAX_PIXELS, MIN_SIDE

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

REDUCING_GAP = 2
"""How much larger than wanted an image stays when it is scaled down while decoding, so that no difference shows."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What Pillow may decode. It knows more, some of which start other programs."""

_BYTES_A_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""What Pillow keeps of a pixel by mode; 4 in all other modes."""

_DECODERS_BYTES = {"WEBP": 16, "JPEG2000": 24}
"""What these decoders need for a pixel in all: two canvases and two copies, integers of 32 bits for each channel."""

_BAND = 2**20  # pixels that are converted at a time

_ORIENTATION = 0x0112  # EXIF tag
_TURNED = (5, 6, 7, 8)  # orientations in which width and height change places
_PADDING = re.compile(r"\b(\d+) extraneous bytes before marker 0xd9")  # libjpeg's warning about bytes left at the end
_MOST_PADDING = 16  # bytes; more of them are data that could not be read

_MOST_SCRATCH = 2**26  # bytes of pixels that a thread keeps
_memory = threading.local()

# Larger images are refused by inspect; a warning beside the refusal would say it twice.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Header:
    """What `inspect` found.

    Attributes:
        format: Pillow's name of the format, such as "JPEG".
        width: Pixels, upright.
        height: Pixels, upright.
        orientation: EXIF's, 1 (upright) to 8.
        turbo: Whether libjpeg-turbo can decode it to RGB.
        traits: What is unusual about it, such as "grayscale", "cmyk", "16-bit", "exif-rotated", "transparent".
    """

    format: str
    width: int
    height: int
    orientation: int
    turbo: bool
    traits: tuple[str, ...]


def inspect(data: bytes) -> Header:
    """Reads the header of an encoded image. Raises Unusable if it is not to be decoded."""
    if not data:
        raise Unusable("image-empty", "the image has no bytes")
    header = _inspect_jpeg(data) if data[:3] == b"\xff\xd8\xff" and simplejpeg is not None else None
    header = header or _inspect_any(data)
    _refuse_above(header.width, header.height, 3)
    if min(header.width, header.height) < MIN_SIDE:
        raise Unusable(
            "image-tiny", f"the image is {header.width} x {header.height}; a side has at least {MIN_SIDE} pixels"
        )
    return header


def decode(
    data: bytes, header: Header, least: tuple[int, int] = (MAX_PIXELS, MAX_PIXELS), *, reuse: bool = False
) -> NDArray[np.uint8]:
    """The image, uint8 [height, width, 3], upright RGB.

    Args:
        data: the encoded image.
        header: what `inspect` said of it.
        least: (height, width) that the result must have at least; a larger JPEG may come scaled down to this size or
            above it. By default it keeps its size.
        reuse: whether the result may lie in memory that this thread's next call overwrites. Fresh memory costs a
            quarter of the time of decoding.

    Raises:
        Unusable: if the image is damaged.
    """
    height, width = least[::-1] if header.orientation in _TURNED else least
    if header.turbo:
        pixels = _decode_turbo(data, height, width, _scratch(header) if reuse else None)
    else:
        pixels = _decode_any(data, header, height, width)
    return np.ascontiguousarray(_upright(pixels, header.orientation))


def _inspect_jpeg(data: bytes) -> Header | None:
    """None if Pillow had better look at it."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # A marker cannot occur within the compressed data, so the end of a whole JPEG follows its last scan.
    whole = data.endswith(b"\xff\xd9") or data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    if colours in ("CMYK", "YCCK") or not whole:
        return None
    orientation = 1
    if _has_exif(data):
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            orientation = _orientation(image)
    return _header("JPEG", width, height, orientation, True, ["grayscale"] if colours == "Gray" else [])


def _has_exif(data: bytes) -> bool:
    """Whether one of the segments before a JPEG's pixels is EXIF's."""
    place = 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            return True
        if marker == 0xDA:  # the pixels begin
            return False
        place += 2 + length
    return False


def _inspect_any(data: bytes) -> Header:
    with _opened(data) as image:
        try:
            return _header_of(data, image)
        except Unusable:
            raise
        except Exception as error:  # what lies behind the first frame is read only now, and may be broken, too
            reason = f"the {image.format} is damaged: {error}"
            raise Unusable("image-corrupt", reason) from error


def _header_of(data: bytes, image: Image.Image) -> Header:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise Unusable("image-animated", f"the image is a {image.format} of {frames} frames")
    traits = []
    if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16"):
        traits.append("grayscale")
    if image.mode in ("CMYK", "YCCK"):
        traits.append("cmyk")
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or _sixteen_bits(data):
        traits.append("16-bit")
    if image.mode == "P":
        traits.append("palette")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        traits.append("transparent")
    orientation = 1
    with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
        orientation = _orientation(image)
    needed = max(_BYTES_A_PIXEL.get(image.mode, 4), _DECODERS_BYTES.get(str(image.format), 0))
    _refuse_above(image.width, image.height, needed)
    return _header(str(image.format), image.width, image.height, orientation, False, traits)


def _refuse_above(width: int, height: int, bytes_a_pixel: int) -> None:
    most = min(MAX_PIXELS, MAX_DECODED_BYTES // bytes_a_pixel)
    if width * height > most:
        raise Unusable("image-bomb", f"the image is {width} x {height}; {most} pixels of its kind are the most")


def _header(name: str, width: int, height: int, orientation: int, turbo: bool, traits: list[str]) -> Header:
    if orientation != 1:
        traits = [*traits, "exif-rotated"]
    if orientation in _TURNED:
        width, height = height, width
    return Header(name, width, height, orientation, turbo, tuple(traits))


def _sixteen_bits(data: bytes) -> bool:
    """Whether this is a PNG of 16 bits a channel, which Pillow opens as if it had 8."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(_ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _scratch(header: Header) -> NDArray[np.uint8] | None:
    """This thread's memory for pixels; None for images too large to keep memory for."""
    size = header.width * header.height * 3
    if size > _MOST_SCRATCH:
        return None
    kept: NDArray[np.uint8] | None = getattr(_memory, "pixels", None)
    if kept is None or len(kept) < size:
        kept = _memory.pixels = np.empty(size, dtype=np.uint8)
    return kept


def _decode_turbo(data: bytes, height: int, width: int, buffer: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    def decoded(strict: bool) -> NDArray[np.uint8]:
        # Only scaling by a half or less is faster than none.
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=2, buffer=buffer, strict=strict
        )
        return pixels

    try:
        return decoded(strict=True)
    except ValueError as error:
        padding = _PADDING.search(str(error))
        if padding is None or int(padding[1]) > _MOST_PADDING:
            raise Unusable("image-corrupt", f"the JPEG is damaged: {error}") from error
        return decoded(strict=False)


def _decode_any(data: bytes, header: Header, height: int, width: int) -> NDArray[np.uint8]:
    with _opened(data) as image:
        try:
            image.draft(None, (min(width, image.width), min(height, image.height)))
            image.load()
            if image.format == "PNG":
                refuse_missing_rows(data, image)
            return _eight_bits(image)
        except Unusable:
            raise
        except MemoryError as error:
            raise Unusable("image-bomb", f"no memory for an image of {header.width} x {header.height}") from error
        except Exception as error:  # decoders fed with broken bytes raise whatever their first mishap is
            kind = "image-truncated" if "truncated" in str(error) else "image-corrupt"
            raise Unusable(kind, f"the {image.format} is damaged: {error}") from error


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """RGB, converted in bands, so that no second copy of the whole is made on the way."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = _eight_bits_of(band)
    return pixels


def _eight_bits_of(band: Image.Image) -> NDArray[np.uint8]:
    mode = band.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(band).astype(np.float64)
        top = 1.0 if mode == "F" else 65535.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
            raise Unusable("image-depth", f"a {mode} image holds values of 0 to {top:g}, got others")
        return np.rint(values * (255 / top)).astype(np.uint8)[:, :, None]
    return np.array(band.convert("RGB"))


@contextlib.contextmanager
def _opened(data: bytes) -> Any:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Unusable("image-bomb", f"the image is too large: {error}") from error
    except Exception as error:  # a broken header raises whatever its first mishap is
        raise Unusable("image-unrecognised", f"no image that can be decoded; it begins with {data[:12]!r}") from error
    with image:
        yield image


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undoes EXIF's orientation: 2, 4 are mirrored, 3 upside down, 5 to 8 lie on a side."""
    if orientation in _TURNED:
        pixels = pixels.transpose(1, 0, 2)
    down = orientation in (3, 4, 7, 8)
    across = orientation in (2, 3, 6, 7)
    return pixels[:: -1 if down else 1, :: -1 if across else 1]
