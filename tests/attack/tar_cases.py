"""Tars: as other programs write them, as downloads leave them, and as an attacker would put them together."""

import gzip
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from broken import encoded, scene
from cases import ACCEPTED, Case, Verdict, written

IMAGE = encoded(scene())
END = bytes(1024)


def tar_cases() -> Iterator[Case]:
    for name, data in WHOLE.items():
        yield Case("tar", name, written(data), ACCEPTED)
    for name, (kinds, data) in BROKEN.items():
        yield Case("tar", name, written(data), Verdict("rejected", kinds))
    yield Case("tar", "an image above the limit", _large, Verdict("rejected", "image-bomb"))


def _large(path: Path, _: Random) -> None:
    """A member of a quarter of a GiB and a byte, which takes no room on a disk."""
    size = 2**28 + 1
    with open(path, "wb") as file:
        file.write(sample("a") + member("b.jpg", size=b"%011o\0" % size))
        file.seek(size + -size % 512, 1)
        file.write(sample("c") + END)


def member(
    name: str | bytes,
    content: bytes = b"",
    *,
    kind: bytes = b"0",
    size: bytes | None = None,
    checksum: bytes | None = None,
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    link: bytes = b"",
) -> bytes:
    """A header put together by hand, and its content in whole blocks."""
    header = bytearray(512)
    encoded_name = name.encode() if isinstance(name, str) else name
    header[0 : len(encoded_name[:100])] = encoded_name[:100]
    header[100:108], header[108:116], header[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    header[124:136] = b"%011o\0" % len(content) if size is None else size
    header[136:148], header[156:157] = b"00000000000\0", kind
    header[157 : 157 + len(link)] = link
    header[257:265] = magic
    header[345 : 345 + len(prefix)] = prefix
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header) if checksum is None else checksum
    return bytes(header) + content + bytes(-len(content) % 512)


def sample(stem: str, text: bytes = b"a cat") -> bytes:
    return member(f"{stem}.jpg", IMAGE) + member(f"{stem}.txt", text)


def packed(form: int, names: tuple[str, ...] = ("a",)) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for name in names:
            for ending, data in ((".jpg", IMAGE), (".txt", b"a cat")):
                info = tarfile.TarInfo(name + ending)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return target.getvalue()


def number(value: int) -> bytes:
    """Base 256, as GNU writes what octal digits cannot hold."""
    return bytes([0x80 if value >= 0 else 0xFF]) + value.to_bytes(11, signed=True)


def pax(*records: bytes, kind: bytes = b"x", size: bytes | None = None) -> bytes:
    return member("paxheader", b"".join(records), kind=kind, size=size)


def record(key: bytes, value: bytes) -> bytes:
    for length in range(len(key) + len(value) + 3, len(key) + len(value) + 30):
        found = b"%d %s=%s\n" % (length, key, value)
        if len(found) == length:
            return found
    raise AssertionError


def sparse(extended: int) -> bytes:
    head = bytearray(member("s.jpg", b"", kind=b"S"))
    head[482] = 1
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    blocks = [bytes(504) + b"\1" + bytes(7)] * (extended - 1) + [bytes(512)]
    return bytes(head) + b"".join(blocks)


GOOD = sample("good-1") + sample("good-2") + END

Bytes = bytes | Callable[[Random], bytes]

WHOLE: dict[str, Bytes] = {
    "ustar": packed(tarfile.USTAR_FORMAT),
    "gnu": packed(tarfile.GNU_FORMAT),
    "pax": packed(tarfile.PAX_FORMAT),
    "long names of gnu": packed(tarfile.GNU_FORMAT, ("d/" * 150 + "a",)),
    "long names of pax": packed(tarfile.PAX_FORMAT, ("d/" * 150 + "a",)),
    "long names of ustar": packed(tarfile.USTAR_FORMAT, ("d" * 90 + "/" + "e" * 90,)),
    "names of other letters": packed(tarfile.PAX_FORMAT, ("\u732b", "K\u00e4tzchen")),
    "of the seventh edition": member("a.jpg", IMAGE, kind=b"\0", magic=bytes(8))
    + member("a.txt", b"a cat", kind=b"\0", magic=bytes(8))
    + END,
    "contiguous files": member("a.jpg", IMAGE, kind=b"7") + member("a.txt", b"a cat", kind=b"7") + END,
    "with a folder": member("a/", kind=b"5") + sample("a/b") + END,
    "with an old folder": member("a/", kind=b"\0") + sample("a/b") + END,
    "with a folder that claims a size": member("a/", kind=b"5", size=b"00000000777\0") + sample("a/b") + END,
    "sizes of base 256": member("a.jpg", IMAGE, size=number(len(IMAGE))) + member("a.txt", b"a cat") + END,
    "sizes with spaces": member("a.jpg", IMAGE, size=b"%11o " % len(IMAGE)) + member("a.txt", b"a cat") + END,
    "sums of signed bytes": member(b"\xe4.jpg", IMAGE, checksum=None) + member(b"\xe4.txt", b"a cat") + END,
    "a global header": pax(record(b"comment", b"x" * 40), kind=b"g") + sample("a") + END,
    "a pax size": pax(record(b"size", b"%d" % len(IMAGE)))
    + member("a.jpg", IMAGE, size=b"0" * 11 + b"\0")
    # its header says 0, which the extension overrides
    + member("a.txt", b"a cat")
    + END,
    "two in one file": sample("a") + END + sample("b") + END,
    "three in one file, padded": (sample("a") + END).ljust(10240, b"\0") * 1
    + sample("b")
    + bytes(10240)
    + sample("c")
    + END,
    "zeros in the middle": sample("a") + bytes(512) + sample("b") + END,
    "one block of zeros at the end": sample("a") + bytes(512),
    "many zeros at the end": sample("a") + bytes(2**22),
    "captions in json": member("a.jpg", IMAGE) + member("a.json", b'{"caption": "a cat"}') + END,
    "a byte order mark": sample("a", b"\xef\xbb\xbfa cat") + END,
    "endings in capitals": member("a.JPG", IMAGE) + member("a.TXT", b"a cat") + END,
    "more than is asked for": sample("a") + member("a.cls", b"3") + member("a.npy", bytes(100)) + END,
    "a dot and a name": sample("./a") + END,
}

BROKEN: dict[str, tuple[str, Bytes]] = {
    "nothing": ("shard-broken", b""),
    "a single byte": ("shard-truncated", b"a"),
    "text": ("shard-broken", b"no tar, and never was\n" * 100),
    "noise": ("shard-broken", lambda draws: b"\1" + draws.randbytes(5000)),
    "a zip": ("shard-broken", b"PK\x03\x04" + bytes(2000)),
    "gzipped": ("shard-broken", lambda draws: gzip.compress(sample("a") + END + draws.randbytes(2000), mtime=0)),
    "no end": ("shard-truncated", sample("a")),
    "cut within an image": ("shard-truncated", member("a.jpg", IMAGE)[:1200]),
    "cut within a header": ("shard-truncated", sample("a") + member("b.jpg", IMAGE)[:300]),
    "junk behind the end": ("shard-broken", sample("a") + END + b"trailer" * 100),
    "a line behind the end": ("shard-truncated", sample("a") + END + b"\n"),
    "a broken header in the middle": ("shard-broken", sample("a") + b"\xaa" * 512 + sample("b") + END),
    "a wrong checksum": ("shard-broken", sample("a") + member("b.jpg", IMAGE, checksum=b"000000\0 ") + END),
    "a checksum of words": ("shard-broken", sample("a") + member("b.jpg", IMAGE, checksum=b"checksum") + END),
    "a size of words": ("shard-broken", sample("a") + member("b.jpg", IMAGE, size=b"large       ") + END),
    "a size of nines": ("shard-broken", sample("a") + member("b.jpg", IMAGE, size=b"99999999999\0") + END),
    "a size above the file": ("shard-truncated", sample("a") + member("b.jpg", IMAGE, size=b"77777777777\0") + END),
    "a size above all files": ("shard-truncated", sample("a") + member("b.jpg", IMAGE, size=number(2**62)) + END),
    "a size above all numbers": (
        "shard-broken",
        sample("a") + member("b.jpg", IMAGE, size=b"\x80" + b"\xff" * 11) + END,
    ),
    **{
        f"a size of {size}": ("shard-broken", sample("a") + member("b.jpg", IMAGE, size=number(size)) + END)
        for size in (-1, -512, -1024, -100_000, -(2**60))
    },
    "a pax size below nothing": (
        "shard-broken",
        sample("a") + pax(record(b"size", b"-512")) + member("b.jpg", IMAGE) + END,
    ),
    "a pax size of words": (
        "shard-broken",
        sample("a") + pax(record(b"size", b"\xff\xfe")) + member("b.jpg", IMAGE) + END,
    ),
    "a pax size above all numbers": (
        "shard-broken",
        sample("a") + pax(record(b"size", b"9" * 40)) + member("b.jpg", IMAGE) + END,
    ),
    "a pax header of length 0": ("shard-broken", sample("a") + pax(b"0 path=x\n") + sample("b") + END),
    "a pax header of length 1": ("shard-broken", sample("a") + pax(b"1 path=x\n") + sample("b") + END),
    "a pax header beyond itself": ("shard-broken", sample("a") + pax(b"999 path=x\n") + sample("b") + END),
    "a pax header without a value": ("shard-broken", sample("a") + pax(b"8 path_\n") + sample("b") + END),
    "a pax header of digits": ("shard-broken", sample("a") + pax(b"1" * 500) + sample("b") + END),
    "a pax header of a world": (
        "shard-broken",
        sample("a") + pax(record(b"path", b"x"), size=b"77777777777\0") + sample("b") + END,
    ),
    "a pax header of a MiB and more": (
        "shard-broken",
        sample("a") + pax(b"1" * (2**20 + 1)) + sample("b") + END,
    ),
    "a long name of a MiB": ("shard-broken", sample("a") + member("@", b"x" * 2**20, kind=b"L") + sample("b") + END),
    "a long name below nothing": (
        "shard-broken",
        sample("a") + member("@", b"x", kind=b"L", size=number(-1)) + sample("b") + END,
    ),
    "ten thousand long names": ("shard-truncated", member("@", b"x", kind=b"L") * 10_000),
    "sparse": ("member-type", sample("a") + sparse(1) + sample("b") + END),
    "sparse without end": ("shard-truncated", sample("a") + sparse(30)[:-512]),
    "sparse by pax": (
        "member-type",
        sample("a") + pax(record(b"GNU.sparse.major", b"1")) + member("b.jpg", IMAGE) + sample("c") + END,
    ),
    "a link": ("member-type", sample("a") + member("b.jpg", kind=b"2", link=b"/etc/passwd") + END),
    "a hard link": ("member-type", sample("a") + member("b.jpg", kind=b"1", link=b"a.jpg") + END),
    "a device": ("member-type", sample("a") + member("b.jpg", kind=b"3") + END),
    "a block device": ("member-type", sample("a") + member("b.jpg", kind=b"4") + END),
    "a pipe": ("member-type", sample("a") + member("b.jpg", kind=b"6") + END),
    "an unknown kind": ("member-type", sample("a") + member("b.jpg", IMAGE, kind=b"Z") + END),
    "a name that leaves": ("unsafe-name unsafe-name", sample("a") + sample("../b") + END),
    "a name that leaves by pax": (
        "unsafe-name",
        sample("a") + pax(record(b"path", b"../../b.jpg")) + member("b.jpg", IMAGE) + END,
    ),
    "an absolute name": ("unsafe-name unsafe-name", sample("a") + sample("/etc/b") + END),
    "a name of no letters": ("unsafe-name", sample("a") + member("", IMAGE) + END),
    "a name of Windows": ("unsafe-name unsafe-name", sample("a") + sample("C:\\b") + END),
    "a name twice": ("duplicate-member duplicate-member", sample("a") * 2 + END),
    "a name twice, apart": ("duplicate-id", sample("a") + sample("b") + sample("a") + END),
    "an image without words": ("text-missing", sample("a") + member("b.jpg", IMAGE) + END),
    "words without an image": ("image-missing", sample("a") + member("b.txt", b"a cat") + END),
    "two images": ("image-several", sample("a") + member("b.png", IMAGE) + sample("b") + END),
    "words in Latin letters": ("text-encoding", sample("a") + sample("b", b"K\xe4tzchen") + END),
    "words of nothing": ("text-empty", sample("a") + sample("b", b"") + END),
    "words without end": ("text-overlong", sample("a") + sample("b", b"x" * 5000) + END),
    "words of many MiB": ("row-overlong", lambda _: sample("a") + sample("b", bytes(2**24 + 1)) + END),
    "a json that is none": (
        "row-broken",
        sample("a") + member("b.jpg", IMAGE) + member("b.json", b"{'caption': 1}") + END,
    ),
    "a json of brackets": (
        "row-broken",
        sample("a") + member("b.jpg", IMAGE) + member("b.json", b"[" * 200_000) + END,
    ),
    "a json that is a list": ("text-type", sample("a") + member("b.jpg", IMAGE) + member("b.json", b"[1]") + END),
}
