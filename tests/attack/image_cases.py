"""Images: what real crawls hold, what a decoder may be attacked with, and odd ones that are fine."""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
from broken import BROKEN_IMAGES, ODD_IMAGES, encoded, scene
from cases import ACCEPTED, Case, Verdict, written
from PIL import Image

from optima.data import images

Bytes = Callable[[Random], bytes]


def image_cases() -> Iterator[Case]:
    unnoticed = {"jpeg-hole"} if images.simplejpeg is None else set()
    for name, (kind, make) in BROKEN_IMAGES.items():
        if name not in unnoticed:
            yield Case("image", name, lambda path, _, make=make: make(path), Verdict("rejected", kind))
    for name, (_, data) in ODD_IMAGES.items():
        yield Case("image", name, written(lambda _, data=data: data()), ACCEPTED)
    for name, (kind, data) in BROKEN.items():
        yield Case("image", name, written(data), Verdict("rejected", kind))
    for name, data in ODD.items():
        yield Case("image", name, written(data), ACCEPTED)
    for name, (kind, make) in PLACES.items():
        yield Case("image", name, make, Verdict("rejected", kind))


def chunk(kind: bytes, content: bytes, checksum: int | None = None, length: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content) if length is None else length) + kind + content + struct.pack(">I", checksum)


def png(
    rows: bytes,
    size: tuple[int, int] = (20, 20),
    *,
    bits: int = 8,
    colour: int = 2,
    interlaced: int = 0,
    before: bytes = b"",
    after: bytes = b"",
    method: tuple[int, int] = (0, 0),
) -> bytes:
    head = struct.pack(">IIBBBBB", *size, bits, colour, *method, interlaced)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + data + after + chunk(b"IEND", b"")


def rows(draws: Random, count: int = 20, length: int = 60) -> bytes:
    return b"".join(b"\0" + draws.randbytes(length) for _ in range(count))


def _jpeg(draws: Random, **options: object) -> bytes:
    pixels = np.asarray(scene()).copy()
    pixels[:4, :4] = draws.randrange(256)
    return encoded(Image.fromarray(pixels), quality=90, **options)


def _with_segment(data: bytes, marker: int, content: bytes, length: int | None = None) -> bytes:
    """A JPEG with a segment behind its start."""
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", length or len(content) + 2) + content + data[2:]


def _without_scan(draws: Random) -> bytes:
    data = _jpeg(draws)
    return data[: data.rindex(b"\xff\xda")] + b"\xff\xd9"


def _gif(width: int, height: int, block: bytes) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + block + b";"


def _bmp(width: int, height: int, bits: int = 24, compression: int = 0, offset: int = 54) -> bytes:
    body = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 1000, 0, 0, offset) + body + bytes(1000)


def _tiff(tags: list[tuple[int, int, int, int]], body: bytes = b"") -> bytes:
    """A little-endian TIFF of tags (number, type, count, value) whose data begin at byte 8."""
    place = 8 + len(body)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", place) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def _grey_tiff(width: int, height: int, *more: tuple[int, int, int, int]) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    return _tiff([*tags, *more], bytes(400))


def _broken_second_page(_: Random) -> bytes:
    """Pillow looks at the second page when it counts them, and raises what it likes."""
    first = _grey_tiff(20, 20, (279, 4, 1, 400))
    tag = struct.pack("<HHHII", 1, 256, 3, 0, 0)
    return first[:-4] + struct.pack("<I", len(first)) + tag + bytes(4)


def _ppm(head: str) -> bytes:
    return head.encode() + bytes(1200)


def _without_rows(draws: Random, kept: int) -> bytes:
    return png(rows(draws, kept))


def _sixteen(top: float) -> bytes:
    values = np.linspace(0, top, 400).reshape(20, 20)
    return encoded(Image.fromarray(values.astype(np.float32)), "TIFF")


def _idat_bomb(draws: Random) -> bytes:
    return png(rows(draws)[:-60] + bytes(60) + bytes(2**24))


def _riff(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


BROKEN: dict[str, tuple[str, Bytes]] = {
    "png of half its rows": ("image-truncated", lambda draws: _without_rows(draws, 10)),
    "png without its last row": ("image-truncated", lambda draws: _without_rows(draws, 19)),
    "png of no rows": ("image-truncated", lambda draws: _without_rows(draws, 0)),
    "png interlaced and short": ("image-(truncated|corrupt)", lambda draws: png(rows(draws, 9), interlaced=1)),
    "png of 16 bits and short": ("image-truncated", lambda draws: png(rows(draws, 10, 120), bits=16)),
    "png with another checksum": (
        "image-corrupt",
        lambda draws: (d := png(rows(draws)))[:-16] + bytes(byte ^ 255 for byte in d[-16:-12]) + d[-12:],
    ),
    "png whose chunk is longer than the file": (
        "image-.*",
        lambda draws: png(rows(draws)).replace(b"IDAT", b"iDAT") + chunk(b"IDAT", b"abc", length=10**6),
    ),
    "png of an unknown filter": ("image-corrupt", lambda draws: png(b"\x09" + rows(draws)[1:])),
    "png of an unknown colour type": ("image-unrecognised", lambda draws: png(rows(draws), colour=5)),
    "png of no width": ("image-unrecognised", lambda draws: png(rows(draws), (0, 20))),
    "png without a header": (
        "image-unrecognised",
        lambda draws: b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", zlib.compress(rows(draws))) + chunk(b"IEND", b""),
    ),
    "png of noise for pixels": (
        "image-corrupt",
        lambda draws: png(b"").replace(zlib.compress(b""), b"") + draws.randbytes(90),
    ),
    "png as long as a world": ("image-bomb", lambda draws: png(rows(draws), (2**31 - 1, 8))),
    "png just above the limit": ("image-bomb", lambda draws: png(rows(draws), (2**13, 2**13 + 1))),
    "jpeg without a scan": ("image-(truncated|corrupt)", _without_scan),
    "jpeg of nothing but its start": ("image-unrecognised", lambda draws: b"\xff\xd8\xff"),
    "jpeg cut in its tables": ("image-unrecognised", lambda draws: _jpeg(draws)[:200]),
    "jpeg without height": (
        "image-unrecognised",
        lambda draws: (d := _jpeg(draws))[: (p := d.index(b"\xff\xc0") + 5)] + b"\0\0" + d[p + 2 :],
    ),
    "jpeg of noise after its start": ("image-unrecognised", lambda draws: b"\xff\xd8\xff\xe0" + bytes(4000)),
    "jpeg of twelve bits": (
        "image-(unrecognised|corrupt)",
        lambda draws: (d := _jpeg(draws))[: (p := d.index(b"\xff\xc0") + 4)] + b"\x0c" + d[p + 1 :],
    ),
    "gif of no frame": ("image-unrecognised", lambda draws: b"GIF89a" + bytes(3)),
    "gif cut before its pixels": ("image-truncated", lambda draws: _gif(20, 20, b"\x02")),
    "gif as large as they get": ("image-bomb", lambda draws: _gif(65535, 65535, b"\x02\x01\x00\x00")),
    "bmp of negative width": ("image-(unrecognised|bomb)", lambda draws: _bmp(-20, 20)),
    "bmp of no width": ("image-unrecognised", lambda draws: _bmp(0, 0)),
    "bmp that claims a world": ("image-bomb", lambda draws: _bmp(60000, 60000)),
    "bmp of 7 bits": ("image-unrecognised", lambda draws: _bmp(20, 20, bits=7)),
    "bmp of an unknown compression": ("image-unrecognised", lambda draws: _bmp(20, 20, compression=99)),
    "tiff without tags": ("image-unrecognised", lambda draws: b"II*\0\x08\0\0\0\0\0\0\0\0\0"),
    "tiff whose directory is itself": ("image-unrecognised", lambda draws: b"II*\0\x04\0\0\0" + bytes(4)),
    "tiff that claims a world": ("image-bomb", lambda draws: _grey_tiff(60000, 60000, (279, 4, 1, 400))),
    "tiff whose second page is none": ("image-(corrupt|animated)", _broken_second_page),
    "tiff of 64 bits": ("image-unrecognised", lambda draws: _tiff([(256, 4, 1, 20), (257, 4, 1, 20), (258, 3, 1, 64)])),
    "tiff of floats above 1": ("image-depth", lambda draws: _sixteen(300.0)),
    "tiff of NaN": ("image-depth", lambda draws: _sixteen(float("nan"))),
    "webp of nothing": ("image-unrecognised", lambda draws: _riff(b"VP8 ", b"")),
    "webp of noise": ("image-unrecognised", lambda draws: _riff(b"VP8L", b"\x2f" + bytes(50))),
    "webp that claims a world": (
        "image-(unrecognised|bomb)",
        lambda draws: _riff(b"VP8X", struct.pack("<I", 0) + b"\xff" * 6),
    ),
    "ppm of no size": ("image-unrecognised", lambda draws: _ppm("P6 0 0 255\n")),
    "ppm that claims a world": ("image-bomb", lambda draws: _ppm("P6 99999 99999 255\n")),
    "ppm that is short": ("image-truncated", lambda draws: _ppm("P6 100 100 255\n")),
    "ppm of words": ("image-unrecognised", lambda draws: _ppm("P6 many rows 255\n")),
    "jpeg2000 cut short": (
        "image-(truncated|corrupt)",
        lambda draws: (d := encoded(scene(), "JPEG2000"))[: len(d) // 3],
    ),
    "ico": ("image-unrecognised", lambda draws: encoded(scene(size=(32, 32)), "ICO")),
    "tga": ("image-unrecognised", lambda draws: encoded(scene(), "TGA")),
    "psd": ("image-unrecognised", lambda draws: b"8BPS\0\1" + bytes(200)),
    "fits": ("image-unrecognised", lambda draws: b"SIMPLE  =                    T" + bytes(5000)),
    "zip": ("image-unrecognised", lambda draws: b"PK\x03\x04" + bytes(100)),
    "elf": ("image-unrecognised", lambda draws: b"\x7fELF" + bytes(100)),
    "json": ("image-unrecognised", lambda draws: b'{"error": "rate limited"}'),
    "two pixels": ("image-tiny", lambda draws: png(rows(draws, 2, 6), (2, 2))),
    "seven pixels": ("image-tiny", lambda draws: png(rows(draws, 7, 300), (100, 7))),
    "jpeg as small as can be": ("image-tiny", lambda draws: encoded(scene(size=(1, 1)))),
    "mask in a file of one byte": ("image-unrecognised", lambda draws: b"\x00"),
}

ODD: dict[str, Bytes] = {
    "png black from end to end": lambda draws: png(bytes(20 * 61)),
    "png of a bomb behind its last row": _idat_bomb,
    "png in many pieces": lambda draws: _in_pieces(rows(draws)),
    "png that names an unknown compression": lambda draws: png(rows(draws), method=(7, 0)),
    "png with a text": lambda draws: png(rows(draws), before=chunk(b"tEXt", b"Comment\0" + draws.randbytes(40))),
    "png of two colours": lambda draws: png(rows(draws, 20, 3), bits=1, colour=0),
    "jpeg with a comment": lambda draws: _with_segment(_jpeg(draws), 0xFE, draws.randbytes(5000)),
    "jpeg with a broken colour profile": lambda draws: _with_segment(
        _jpeg(draws), 0xE2, b"ICC_PROFILE\0\1\1" + bytes(9)
    ),
    "jpeg with restart markers": lambda draws: _jpeg(draws, restart_marker_blocks=2),
    "jpeg with a page of text behind it": lambda draws: _jpeg(draws) + b"<html>" * 100,
    "jpeg of the least quality": lambda draws: encoded(scene(), quality=1),
    "webp of the least quality": lambda draws: encoded(scene(), "WEBP", quality=0),
    "webp without loss": lambda draws: encoded(scene("RGBA"), "WEBP", lossless=True),
    "gif of grey": lambda draws: encoded(scene("L"), "GIF"),
    "bmp of one bit": lambda draws: encoded(scene("1"), "BMP"),
    "tiff packed": lambda draws: encoded(scene(), "TIFF", compression="tiff_lzw"),
    "tiff of floats": lambda draws: _sixteen(1.0),
    "ppm": lambda draws: encoded(scene(), "PPM"),
    "jpeg2000": lambda draws: encoded(scene(), "JPEG2000"),
    "as small as may be": lambda draws: png(rows(draws, 8, 24), (8, 8)),
    "long and low": lambda draws: encoded(scene(size=(4000, 8)), "PNG"),
}


def _in_pieces(raw: bytes) -> bytes:
    packed = zlib.compress(raw)
    pieces = b"".join(chunk(b"IDAT", packed[at : at + 7]) for at in range(0, len(packed), 7))
    return png(b"").replace(chunk(b"IDAT", zlib.compress(b"")), pieces)


def _linked_to(target: str) -> Callable[[Path, Random], None]:
    return lambda path, _: path.symlink_to(target)


def _endless(path: Path, _: Random) -> None:
    (path.parent / "a").symlink_to("b")
    (path.parent / "b").symlink_to("a")
    path.symlink_to("a")


PLACES: dict[str, tuple[str, Callable[[Path, Random], None]]] = {
    "a link to a device without end": ("image-unreadable", _linked_to("/dev/zero")),
    "a link to an empty device": ("image-unreadable", _linked_to("/dev/null")),
    "links in a circle": ("image-unreadable", _endless),
    "a pipe": ("image-unreadable", lambda path, _: os.mkfifo(path)),
}
