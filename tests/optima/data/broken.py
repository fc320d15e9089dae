"""Things that come with real data: images, texts, rows and tars that cannot be used, and odd ones that can."""

import gzip
import io
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from optima.data.pictograms.render import render
from optima.data.pictograms.stream import Pictograms

Make = Callable[[Path], None]


def scene(mode: str = "RGB", size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A pictogram scene, never symmetric, as every orientation must be told apart."""
    pixels = render(Pictograms("train").example("captioning", 3).scenes[0]).transpose(1, 2, 0).copy()
    pixels[:8, :20] = (250, 20, 20)
    return Image.fromarray(pixels).resize(size).convert(mode)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def _written(data: Callable[[], bytes]) -> Make:
    return lambda path: (path.write_bytes(data()), None)[1]


def _hole() -> bytes:
    """A sector that was never written."""
    data = bytearray(encoded(scene(size=(300, 200)), quality=95))
    start = data.rindex(b"\xff\xda") + 400
    data[start : start + 1024] = bytes(1024)
    return bytes(data)


def _huffman_table_that_cannot_be() -> bytes:
    data = bytearray(encoded(scene()))
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16
    return bytes(data)


def _jpeg_that_claims(width: int, height: int) -> bytes:
    data = bytearray(encoded(scene()))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def _png_with_a_wrong_checksum() -> bytes:
    data = bytearray(encoded(scene(), "PNG"))
    data[data.index(b"IDAT") + 20] ^= 0x55
    return bytes(data)


def _png_with_a_text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 80_000_000, zip=True)
    return encoded(scene(), "PNG", pnginfo=info)


def _frames(form: str) -> bytes:
    other = scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return encoded(scene(), form, save_all=True, append_images=[other], **({"duration": 100} if form != "TIFF" else {}))


def _floats_out_of_range() -> bytes:
    return encoded(Image.fromarray(np.linspace(-5, 5, 64 * 64, dtype=np.float32).reshape(64, 64)), "TIFF")


def _huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(300 * 2**20)


BROKEN_IMAGES: dict[str, tuple[str, Make]] = {
    "zero-bytes": ("image-empty", _written(lambda: b"")),
    "html-page": ("image-unrecognised", _written(lambda: b"<!DOCTYPE html><html><body>404</body></html>")),
    "plain-text": ("image-unrecognised", _written(lambda: b"not found\n")),
    "noise": ("image-unrecognised", _written(lambda: random.Random(1).randbytes(5000))),
    "zeros": ("image-unrecognised", _written(lambda: bytes(5000))),
    "svg": ("image-unrecognised", _written(lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    "pdf": ("image-unrecognised", _written(lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")),
    "eps": ("image-unrecognised", _written(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n")),
    "heic": ("image-unrecognised", _written(lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))),
    "gzipped": ("image-unrecognised", _written(lambda: gzip.compress(encoded(scene())))),
    "jpeg-cut-in-header": ("image-unrecognised", _written(lambda: encoded(scene())[:40])),
    "jpeg-cut-in-half": ("image-truncated", _written(lambda: (d := encoded(scene()))[: len(d) // 2])),
    "jpeg-without-end": ("image-truncated", _written(lambda: encoded(scene())[:-30])),
    "jpeg-hole": ("image-corrupt", _written(_hole)),
    "jpeg-wrong-table": ("image-corrupt", _written(_huffman_table_that_cannot_be)),
    "jpeg-bomb": ("image-bomb", _written(lambda: _jpeg_that_claims(65500, 65500))),
    "png-cut-in-half": ("image-truncated", _written(lambda: (d := encoded(scene(), "PNG"))[: len(d) // 2])),
    "png-wrong-checksum": ("image-corrupt", _written(_png_with_a_wrong_checksum)),
    "png-bomb": ("image-bomb", _written(lambda: _png_that_claims(60000, 60000))),
    "png-huge-bomb": ("image-bomb", _written(lambda: _png_that_claims(2**31 - 1, 2**31 - 1))),
    "png-text-bomb": ("image-unrecognised", _written(_png_with_a_text_bomb)),
    "png-without-pixels": ("image-truncated", _written(lambda: _png_that_claims(640, 480))),
    "webp-cut-in-half": ("image-unrecognised", _written(lambda: (d := encoded(scene(), "WEBP"))[: len(d) // 2])),
    "gif-cut-in-half": ("image-truncated", _written(lambda: (d := encoded(scene("P"), "GIF"))[: len(d) // 2])),
    "bmp-cut-in-half": ("image-truncated", _written(lambda: (d := encoded(scene(), "BMP"))[: len(d) // 2])),
    "tiff-cut-in-half": ("image-truncated", _written(lambda: (d := encoded(scene(), "TIFF"))[: len(d) // 2])),
    "animated-gif": ("image-animated", _written(lambda: _frames("GIF"))),
    "animated-webp": ("image-animated", _written(lambda: _frames("WEBP"))),
    "animated-png": ("image-animated", _written(lambda: _frames("PNG"))),
    "tiff-of-pages": ("image-animated", _written(lambda: _frames("TIFF"))),
    "one-pixel": ("image-tiny", _written(lambda: encoded(scene("P", (1, 1)), "GIF"))),
    "a-rule": ("image-tiny", _written(lambda: encoded(scene(size=(3000, 2)), "PNG"))),
    "floats-out-of-range": ("image-depth", _written(_floats_out_of_range)),
    "directory": ("image-unreadable", lambda path: path.mkdir()),
    "pipe": ("image-unreadable", lambda path: os.mkfifo(path)),
    "link-to-nowhere": ("image-missing", lambda path: path.symlink_to("nowhere.jpg")),
    "huge-file": ("image-bomb", _huge),
    "missing": ("image-missing", lambda path: None),
}


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _sixteen_bit_rgb() -> bytes:
    """16 bits a channel: Pillow cannot write that, so it is put together here."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = np.asarray(scene()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _sixteen_bit_grey() -> bytes:
    return encoded(Image.fromarray(np.asarray(scene("L")).astype(np.uint16) * 257), "PNG")


ODD_IMAGES: dict[str, tuple[set[str], Callable[[], bytes]]] = {
    "grey.jpg": ({"grayscale"}, lambda: encoded(scene("L"))),
    "cmyk.jpg": ({"cmyk"}, lambda: encoded(scene("CMYK"))),
    "bits.png": ({"grayscale"}, lambda: encoded(scene("1"), "PNG")),
    "grey-16-bit.png": ({"grayscale", "16-bit"}, _sixteen_bit_grey),
    "rgb-16-bit.png": ({"16-bit"}, _sixteen_bit_rgb),
    "palette.png": ({"palette"}, lambda: encoded(scene("P"), "PNG")),
    "still.gif": ({"palette"}, lambda: encoded(scene("P"), "GIF")),
    "transparent.png": ({"transparent"}, lambda: encoded(scene("RGBA"), "PNG")),
    "still.webp": (set(), lambda: encoded(scene(), "WEBP")),
    "plain.bmp": (set(), lambda: encoded(scene(), "BMP")),
    "plain.tif": (set(), lambda: encoded(scene(), "TIFF")),
    "progressive.jpg": (set(), lambda: encoded(scene(), progressive=True)),
    "444.jpg": (set(), lambda: encoded(scene(), subsampling=0)),
    "named-wrongly.png": (set(), lambda: encoded(scene())),
    "trailing-bytes.jpg": (set(), lambda: encoded(scene()) + b"\r\nBoundary--"),
    "broken-exif.jpg": (set(), lambda: encoded(scene(), exif=b"Exif\0\0" + b"\x7f" * 40)),
    **{
        f"turned-{turn}.jpg": ({"exif-rotated"}, lambda turn=turn: encoded(scene(), exif=_exif(turn), quality=95))
        for turn in range(2, 9)
    },
    "turned.png": ({"exif-rotated"}, lambda: encoded(scene(), "PNG", exif=_exif(6))),
}


BROKEN_TEXTS: dict[str, tuple[str, object]] = {
    "empty": ("text-empty", ""),
    "blank": ("text-empty", " \t \u00a0"),
    "zero-width": ("text-empty", "\u200b\u200d\ufeff"),
    "control-characters": ("text-empty", "\x00\x01\x7f"),
    "overlong": ("text-overlong", "word " * 2000),
    "half-a-surrogate": ("text-encoding", "a cat \ud83d"),
    "null": ("text-type", None),
    "number": ("text-type", 17),
    "object": ("text-type", {"raw": "a cat"}),
    "none": ("text-missing", []),
}

BROKEN_LINES: dict[str, tuple[str, bytes]] = {
    "cut": ("row-broken", b'{"file_name": "good.jpg", "text": "a c'),
    "python": ("row-broken", b"{'file_name': 'good.jpg', 'text': 'a cat'}"),
    "deep": ("row-broken", b"[" * 100_000),
    "latin-1": ("row-encoding", '{"file_name": "good.jpg", "text": "ein K\u00e4tzchen"}'.encode("latin-1")),
    "list": ("row-type", b'["good.jpg", "a cat"]'),
    "no-name": ("unsafe-name", b'{"text": "a cat"}'),
    "up": ("unsafe-name", b'{"file_name": "../secret.jpg", "text": "a cat"}'),
    "up-within": ("unsafe-name", b'{"file_name": "a/../../secret.jpg", "text": "a cat"}'),
    "absolute": ("unsafe-name", b'{"file_name": "/etc/passwd", "text": "a cat"}'),
    "windows": ("unsafe-name", b'{"file_name": "C:\\\\cat.jpg", "text": "a cat"}'),
    "zero-in-name": ("unsafe-name", b'{"file_name": "a\\u0000.jpg", "text": "a cat"}'),
}


def make_tar(path: Path) -> dict[str, str]:
    """A shard with one good sample and one of each fault -> the kind of rejection by what it must be named after."""
    image = encoded(scene())
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, link
            tar.addfile(info, io.BytesIO(data))

        add("good.jpg", image)
        add("good.txt", "ein K\u00e4tzchen".encode())
        add("../escape.jpg", image)
        add("/etc/absolute.jpg", image)
        add("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.jpg", kind=tarfile.LNKTYPE, link="good.jpg")
        add("device.jpg", kind=tarfile.CHRTYPE)
        add("twice.jpg", image)
        add("twice.jpg", image)
        add("twice.txt", b"a cat")
        add("lonely.jpg", image)
        add("blind.txt", b"a cat")
        add("two.jpg", image)
        add("two.png", image)
        add("two.txt", b"a cat")
        add("bad-json.jpg", image)
        add("bad-json.json", b"{")
        add("latin.jpg", image)
        add("latin.txt", "K\u00e4tzchen".encode("latin-1"))
        add("last.jpg", image)
        add("last.txt", b"a cat")
    return {
        "../escape.jpg": "unsafe-name",
        "/etc/absolute.jpg": "unsafe-name",
        "link.jpg": "member-type",
        "hard.jpg": "member-type",
        "device.jpg": "member-type",
        "twice.jpg": "duplicate-member",
        "lonely": "text-missing",
        "blind": "image-missing",
        "two": "image-several",
        "bad-json": "row-broken",
        "latin": "text-encoding",
    }
