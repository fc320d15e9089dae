"""What Pillow does not notice of a PNG: pixel data that end before the last row, and chunks that were changed."""

import zlib
from collections.abc import Iterator, Sequence

from PIL import Image

from optima.data.record import Unusable

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: first column and row of each pass, and its steps across and down."""

_PIECE = 2**16


def refuse_missing_rows(data: bytes, image: Image.Image) -> None:
    """Raises Unusable if a PNG's pixel data are shorter than its size wants, or a chunk has not the checksum it gives.

    Args:
        data: the encoded image.
        image: the same as Pillow has loaded it; where data were missing it is black.
    """
    pixels = [content for kind, content in _chunks(data) if kind == b"IDAT"]
    # Rows are decoded in order, so a last one that is not black has been there. Interlaced images have several.
    last = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    if any(last) and data[28] == 0:
        return
    needed = _bytes_of_rows(data)
    unpacked = _unpacked(pixels, needed)
    if unpacked < needed:
        raise Unusable("image-truncated", f"the PNG holds {unpacked} of {needed} bytes of pixels")


def _unpacked(pixels: Sequence[memoryview], needed: int) -> int:
    """Bytes that the pixel data unpack to; no more than about `needed` are unpacked."""
    found, stream = 0, zlib.decompressobj()
    for content in pixels:
        left: bytes | memoryview = content
        while found < needed and not stream.eof:
            piece = stream.decompress(left, _PIECE)
            found, left = found + len(piece), stream.unconsumed_tail
            if len(piece) < _PIECE and not left:
                break
    return found


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The chunks up to the last. Raises Unusable for one that no reader may pass over and that was changed."""
    view, place = memoryview(data), 8
    while place + 12 <= len(data):
        length, kind = int.from_bytes(view[place : place + 4]), bytes(view[place + 4 : place + 8])
        content, after = view[place + 8 : place + 8 + length], place + 8 + length
        if kind[:1].isupper() and zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(view[after : after + 4]):
            raise Unusable("image-corrupt", f"the PNG is damaged: chunk {kind!r} has another checksum than it gives")
        yield kind, content
        if kind == b"IEND":
            return
        place = after + 4


def _bytes_of_rows(data: bytes) -> int:
    """What the pixel data unpack to: of each row a byte for its filter, then its pixels."""
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    bits = data[24] * _CHANNELS.get(data[25], 1)

    def rows(columns: int, lines: int) -> int:
        return lines * (1 + -(-columns * bits // 8)) if columns else 0

    if data[28] == 0:
        return rows(width, height)
    return sum(
        rows(max(0, -(-(width - left) // across)), max(0, -(-(height - top) // down)))
        for left, top, across, down in _PASSES
    )
