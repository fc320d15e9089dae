"""PNGs with pixels missing: refused, however well the rest fits; whole ones of every kind are kept."""

import itertools
import random
import struct
import zlib

import numpy as np
import pytest

from optima.data.images import decode, inspect
from optima.data.record import Unusable

KINDS = [
    (0, 1),
    (0, 2),
    (0, 4),
    (0, 8),
    (0, 16),
    (2, 8),
    (2, 16),
    (3, 1),
    (3, 4),
    (3, 8),
    (4, 8),
    (4, 16),
    (6, 8),
    (6, 16),
]
"""Colour type and bits, all that PNG has but for (3, 2)."""

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def rows_of(width: int, height: int, colour: int, bits: int, interlaced: bool) -> list[int]:
    """Bytes of each row of each pass, its filter included."""
    passes = PASSES if interlaced else [(0, 0, 1, 1)]
    found = []
    for left, top, across, down in passes:
        columns, lines = len(range(left, width, across)), len(range(top, height, down))
        found += [1 + (columns * bits * CHANNELS[colour] + 7) // 8] * (lines if columns else 0)
    return found


def png(size: tuple[int, int], colour: int, bits: int, interlaced: bool, rows: bytes, parts: int = 1) -> bytes:
    head = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, int(interlaced))
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    packed = zlib.compress(rows)
    cuts = [len(packed) * i // parts for i in range(parts + 1)]
    data = b"".join(chunk(b"IDAT", packed[a:b]) for a, b in itertools.pairwise(cuts))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "bits"), KINDS)
def test_whole_images_are_kept_black_ones_too_and_short_ones_refused(
    colour: int, bits: int, interlaced: bool, seed: int
) -> None:
    draws = random.Random(seed)
    size = (draws.randrange(8, 40), draws.randrange(8, 40))
    lengths = rows_of(*size, colour, bits, interlaced)
    for fill in (bytes, draws.randbytes):
        rows = b"".join(b"\0" + fill(length - 1) for length in lengths)
        whole = png(size, colour, bits, interlaced, rows, draws.randrange(1, 5))
        assert decode(whole, inspect(whole)).shape == (size[1], size[0], 3)
        for short in (rows[: len(rows) // 2], rows[: -lengths[-1]], rows[:0]):
            broken = png(size, colour, bits, interlaced, short)
            with pytest.raises(Unusable):
                decode(broken, inspect(broken))


def test_a_chunk_with_another_checksum_is_refused(seed: int) -> None:
    rows = b"".join(b"\0" + np.random.default_rng(seed).bytes(60) for _ in range(20))
    whole = png((20, 20), 2, 8, False, rows)
    place = whole.index(b"IEND") - 8  # the checksum of IDAT
    broken = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    with pytest.raises(Unusable, match="checksum") as caught:
        decode(broken, inspect(broken))
    assert caught.value.kind == "image-corrupt"


def test_pixel_data_that_unpack_without_end_are_not_unpacked() -> None:
    """A bomb behind the last row: a black image is looked at closer, but only as far as its rows go."""
    rows = bytes(20 * 61) + bytes(2**26)
    bomb = png((20, 20), 2, 8, False, rows)
    assert decode(bomb, inspect(bomb)).shape == (20, 20, 3)
