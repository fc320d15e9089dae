"""Where the members of a tar lie: its headers read one after the other, without trust in any of them.

Python's `tarfile` steps backwards at a negative size, takes a broken header for the end of the archive, and reads
extension headers of any size; here offsets grow, sizes are bounded, and whatever is not read is said. Understood are
V7, ustar, GNU (long names, large numbers; sparse members are told apart) and pax (path and size). Zeros end an archive;
what follows them is read on as the next one, as in `cat a.tar b.tar`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from optima.data.record import Unusable
from optima.data.remote import Readable
from optima.limits import MAX_TAR_HEADER_BYTES, MAX_TAR_NAME_BYTES
from optima.untrusted import shown

BLOCK = 512
_PIECE = 2**20  # bytes of zeros that are passed over at a time
_PLAIN = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_SPARSE, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"S", b"L", b"K", b"x", b"g"


class Member(NamedTuple):
    """kind: "file", "folder" or "other" (links, devices, sparse files). offset, size: its data, bytes of the tar."""

    name: str
    kind: str
    offset: int
    size: int


def tar_members(path: Path) -> Iterator[Member]:
    """The members of a tar, in order.

    Raises:
        Unusable: where the tar is broken or ends early, after the members before that place.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        yield from members_of(file, os.fstat(file.fileno()).st_size)


def members_of(file: Readable, length: int) -> Iterator[Member]:
    """As `tar_members`, of something that is open and has `length` bytes."""
    if not length:
        raise Unusable("shard-broken", "no tar that can be read: it is empty")
    place, ended = 0, False
    extended: dict[str, str] = {}
    everywhere: dict[str, str] = {}
    while True:
        header = _read(file, place, BLOCK, length) if place < length or not ended else b""
        if not header:
            return
        if not any(header):
            place, ended = _after_zeros(file, place), True
            continue
        size = _check(header, place)
        data, kind = place + BLOCK, header[156:157]
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            content = _extension(file, kind, data, size, length)
            if kind == _LONG_NAME:
                extended["path"] = _text(content)
            elif kind != _LONG_LINK:
                (extended if kind == _PAX else everywhere).update(_pax(content, data))
            place = data + _blocks(size)
            continue
        member, place = _member(file, header, data, size, everywhere | extended, length)
        extended = {}
        if member.offset + member.size > length:
            raise Unusable("shard-truncated", f"the tar ends within {shown(member.name)}")
        yield member


def _member(
    file: Readable, header: bytes, data: int, size: int, extended: dict[str, str], length: int
) -> tuple[Member, int]:
    """The member of a header, and where the next header is."""
    kind, name = header[156:157], extended.get("path", _name(header))
    if kind == _SPARSE:
        more = header[482]
        while more:
            more = _read(file, data, BLOCK, length)[504]
            data += BLOCK
    if "size" in extended:
        size = _digits(extended["size"].encode("utf-8", "surrogateescape"), 10, data - BLOCK)
    if kind == b"\0" and name.endswith("/"):  # how the oldest tars say it
        kind = b"5"
    if kind in _WITHOUT_DATA:
        size = 0
    word = "folder" if kind == b"5" else "file" if kind in _PLAIN and not _says_sparse(extended) else "other"
    return Member(name.rstrip("/") if word == "folder" else name, word, data, size), data + _blocks(size)


def _read(file: Readable, place: int, size: int, length: int) -> bytes:
    if place + size > length:
        raise Unusable("shard-truncated", f"the tar has no end after byte {min(place, length)}")
    file.seek(place)
    return file.read(size)


def _after_zeros(file: Readable, place: int) -> int:
    """The block of the first byte after `place` that is none, or the end of the file."""
    file.seek(place)
    while piece := file.read(_PIECE):
        found = len(piece) - len(piece.lstrip(b"\0"))
        place += found
        if found < len(piece):
            return place - place % BLOCK
    return place


def _check(header: bytes, place: int) -> int:
    """The size that a header gives; raises Unusable if it is no header."""
    said = _number(header[148:156], place)
    rest = header[:148] + b" " * 8 + header[156:]
    # Some old programs added the bytes up as signed ones.
    if said not in (sum(rest), sum(byte - 256 if byte > 127 else byte for byte in rest)):
        raise Unusable("shard-broken", f"no tar that can be read: the header at byte {place} is broken")
    return _number(header[124:136], place)


def _number(field: bytes, place: int) -> int:
    """Octal digits, or, after a first bit that is set, a number of base 256."""
    if field[0] & 0x80:
        number = int.from_bytes(field[1:]) if field[0] == 0x80 else -1
        if not 0 <= number < 2**63:
            raise Unusable("shard-broken", f"no tar that can be read: the header at byte {place} has a negative size")
        return number
    return _digits(field.partition(b"\0")[0].strip(b" ") or b"0", 8, place)


def _digits(text: bytes, base: int, place: int) -> int:
    if not text.isdigit() or len(text) > 20 or (base == 8 and not set(text) <= set(b"01234567")):
        raise Unusable(
            "shard-broken", f"no tar that can be read: the header at byte {place} has no number {text!r:.40}"
        )
    return int(text, base)


def _extension(file: Readable, kind: bytes, data: int, size: int, length: int) -> bytes:
    most = MAX_TAR_NAME_BYTES if kind in (_LONG_NAME, _LONG_LINK) else MAX_TAR_HEADER_BYTES
    if size > most:
        raise Unusable("shard-broken", f"the extension header before byte {data} has {size} bytes; {most} are the most")
    return _read(file, data, size, length)


def _pax(content: bytes, place: int) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n", of which LENGTH counts all its bytes."""
    found: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at]:
        digits = content[at : at + 8].partition(b" ")[0]
        length = _digits(digits, 10, place)
        record = content[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or at + length > len(content) or not equals or not value.endswith(b"\n"):
            raise Unusable("shard-broken", f"the pax header before byte {place} is broken")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            found[_text(key)] = _text(value[:-1])
        at += length
    return found


def _says_sparse(extended: dict[str, str]) -> bool:
    return any(key.startswith("GNU.sparse.") for key in extended)


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _blocks(size: int) -> int:
    """Bytes of whole blocks that hold `size` bytes."""
    return -(-size // BLOCK) * BLOCK
