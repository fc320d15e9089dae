"""Members of tars: as Python's tarfile finds them in whole ones, and an end of every broken one."""

import contextlib
import io
import random
import tarfile
from pathlib import Path

import pytest

from optima.data.record import Unusable
from optima.data.records import open_records
from optima.data.tar_index import Member, tar_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def random_tar(draws: random.Random, form: int) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for number in range(draws.randrange(1, 12)):
            longest = 90 if form == tarfile.USTAR_FORMAT else 400
            letters = "abc/ü漢 ." if form != tarfile.USTAR_FORMAT else "abc/."
            stem = "".join(draws.choice(letters) for _ in range(draws.randrange(1, longest))).strip("/ ") or "x"
            info = tarfile.TarInfo(f"{number}{stem}")
            info.type = draws.choice([tarfile.REGTYPE] * 4 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
            info.linkname = "b" * draws.randrange(1, 99) if info.type == tarfile.SYMTYPE else ""
            content = draws.randbytes(draws.randrange(3000)) if info.type == tarfile.REGTYPE else b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return target.getvalue()


def as_tarfile_sees(data: bytes) -> list[Member]:
    def kind(info: tarfile.TarInfo) -> str:
        return "file" if info.isreg() else "folder" if info.isdir() else "other"

    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [Member(info.name, kind(info), info.offset_data, info.size) for info in tar]


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_that_tarfile_finds(form: str, tmp_path: Path, seed: int) -> None:
    draws = random.Random(seed)
    for _ in range(40):
        data = random_tar(draws, FORMATS[form])
        (tmp_path / "a.tar").write_bytes(data)
        assert list(tar_members(tmp_path / "a.tar")) == as_tarfile_sees(data)


def test_what_follows_the_end_of_an_archive_is_read_on(tmp_path: Path, seed: int) -> None:
    draws = random.Random(seed)
    first, second = random_tar(draws, tarfile.GNU_FORMAT), random_tar(draws, tarfile.PAX_FORMAT)
    (tmp_path / "both.tar").write_bytes(first + second)
    later = [member._replace(offset=member.offset + len(first)) for member in as_tarfile_sees(second)]
    assert list(tar_members(tmp_path / "both.tar")) == as_tarfile_sees(first) + later


def test_two_shards_in_one_file_lose_nothing(tmp_path: Path) -> None:
    from broken import encoded, scene

    image = encoded(scene())
    parts = []
    for name in ("one", "two"):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w") as tar:
            for ending, data in (("jpg", image), ("txt", b"a cat")):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        parts.append(target.getvalue())
    (tmp_path / "train-0.tar").write_bytes(b"".join(parts))
    records = open_records("webdataset", tmp_path, "train")
    assert [record.id for record in records.items] == ["train-0/one", "train-0/two"]
    (tmp_path / "train-0.tar").write_bytes(parts[0] + b"no header at all" * 64)
    records = open_records("webdataset", tmp_path, "train", max_rejected=0.9)
    assert [record.id for record in records.items] == ["train-0/one"]
    assert [found.kind for found in records.rejected] == ["shard-broken"]


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def header_of(kind: bytes = b"0", size: bytes = b"00000000005\0") -> bytes:
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = size, kind
    return with_checksum(header)


@pytest.mark.parametrize("negative", [-1, -512, -1024, -100_000, -(2**63)])
def test_a_negative_size_ends_the_shard(negative: int, tmp_path: Path) -> None:
    data = random_tar(random.Random(5), tarfile.GNU_FORMAT)
    size = bytes([0xFF]) + negative.to_bytes(11, signed=True)
    end = len(data.rstrip(b"\0")) + -len(data.rstrip(b"\0")) % 512
    (tmp_path / "a.tar").write_bytes(data[:end] + header_of(size=size) + bytes(2048))
    found = []
    with pytest.raises(Unusable, match="negative size"):
        found.extend(tar_members(tmp_path / "a.tar"))
    (tmp_path / "b.tar").write_bytes(data)
    assert list(tar_members(tmp_path / "b.tar")) == as_tarfile_sees(data)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (header_of(kind=b"L", size=b"77777777777\0") + bytes(1024), "extension header"),
        (header_of(kind=b"x", size=b"00010000000\0") + bytes(1024), "extension header"),
        (header_of(kind=b"x", size=b"00000000100\0") + b"999 path=a\n".ljust(512, b"\0") + bytes(1024), "pax header"),
        (header_of(kind=b"x", size=b"00000000100\0") + b"0 path=a\n".ljust(512, b"\0") + bytes(1024), "pax header"),
        (header_of(kind=b"x", size=b"00000000100\0") + b"11 size=-5\n".ljust(512, b"\0") + header_of(), "no number"),
        (header_of(size=b"00000000x05\0") + bytes(1024), "no number"),
        (header_of(kind=b"L") + b"abc".ljust(512, b"\0"), "no end"),
        (header_of(), "ends within"),
        (b"\x1f\x8b" + bytes(600), "broken"),
        (b"", "empty"),
    ],
)
def test_broken_headers_are_told_apart(data: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(Unusable, match=complaint):
        list(tar_members(tmp_path / "a.tar"))


def test_any_changed_byte_leaves_offsets_that_grow_and_stay_within_the_file(tmp_path: Path, seed: int) -> None:
    draws = random.Random(seed)
    whole = random_tar(draws, tarfile.PAX_FORMAT)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draws.randrange(1, 4)):
            data[draws.randrange(len(data))] = draws.randrange(256)
        (tmp_path / "a.tar").write_bytes(data)
        last = -1
        with contextlib.suppress(Unusable):
            for member in tar_members(tmp_path / "a.tar"):
                assert last < member.offset <= member.offset + member.size <= len(data)
                last = member.offset
