"""Captions: texts, rows of JSONL and whole tables, as crawls, spreadsheets and attackers write them."""

import json
from collections.abc import Iterator
from random import Random

from broken import BROKEN_LINES, BROKEN_TEXTS
from cases import ACCEPTED, Case, Verdict, written

from optima.limits import MAX_LINE_BYTES, MAX_TEXT_CHARACTERS


def text_cases() -> Iterator[Case]:
    for name, (kind, text) in (BROKEN_TEXTS | TEXTS).items():
        row = json.dumps({"file_name": "good.jpg", "text": text}).encode()
        yield Case("row", f"text {name}", written(row), Verdict("rejected", kind) if kind else ACCEPTED)
    for name, (kind, line) in (BROKEN_LINES | LINES).items():
        yield Case("row", f"line {name}", written(line), Verdict("rejected", kind) if kind else ACCEPTED)
    for name, (kind, table) in TABLES.items():
        yield Case("captions", name, written(table), Verdict("rejected", kind) if kind else ACCEPTED, "a.tsv")
    for name, (complaint, table) in REFUSED.items():
        yield Case("captions", name, written(table), Verdict("refused", complaint), "a.tsv")
    yield Case("captions", "noise", written(_noise), Verdict("refused", "items cannot be used"), "a.jsonl")


def _noise(draws: Random) -> bytes:
    return b"\n".join(b"\xff" + draws.randbytes(50).replace(b"\n", b"") for _ in range(20))


TEXTS: dict[str, tuple[str, object]] = {
    "of emoji": ("", "\U0001f468\u200d\U0001f469\u200d\U0001f467 at home"),
    "from right to left": ("", "\u202e\u05d7\u05ea\u05d5\u05dc\u202c"),
    "with an escape sequence": ("", "a \x1b[31mred\x1b[0m cat"),
    "with markup": ("", "[bold]a cat[/bold] <script>alert(1)</script>"),
    "of a format string": ("", "%s %n {0.__class__}"),
    "with stacked accents": ("", "Z\u0351\u036b\u0343" * 20),
    "with a zero byte": ("", "a\0cat"),
    "with lines": ("", "a\r\ncat\u2028on\u2029a sofa"),
    "as long as may be": ("", "a" * MAX_TEXT_CHARACTERS),
    "one letter too long": ("text-overlong", "a" * (MAX_TEXT_CHARACTERS + 1)),
    "that grows in its normal form": ("text-overlong", "\ufb2c" * MAX_TEXT_CHARACTERS),
    "of a tag alone": ("text-empty", "\U000e0041\U000e007f"),
    "of private letters": ("text-empty", "\ue000\uf8ff"),
    "of separators": ("text-empty", "\u2028\u2029\u3000"),
    "of a byte order mark": ("text-empty", "\ufeff"),
    "of the second half of a pair": ("text-encoding", "\udc00"),
    "true": ("text-type", True),
    "not a number": ("text-type", float("nan")),
    "without end": ("text-type", float("inf")),
    "a list of lists": ("text-type", [["a cat"]]),
    "a list with a hole": ("text-type", ["a cat", None]),
    "a list of an empty one": ("text-empty", [""]),
    "of a hundred captions": ("", [f"cat {number}" for number in range(100)]),
}

LINES: dict[str, tuple[str, bytes]] = {
    "of nothing but space": ("", b"   \t "),
    "of a byte order mark": ("row-broken", b"\xef\xbb\xbf{}"),
    "of zeros": ("row-broken", bytes(500)),
    "null": ("row-type", b"null"),
    "a number": ("row-type", b"17"),
    "a number of 5000 digits": ("row-broken", b"1" * 5000),
    "a number without end": ("row-type", b"1e999"),
    "two objects": ("row-broken", b'{"file_name": "good.jpg"} {"text": "a cat"}'),
    "with a comment": ("row-broken", b'{"file_name": "good.jpg", "text": "a cat"} // mine'),
    "with a comma too many": ("row-broken", b'{"file_name": "good.jpg", "text": "a cat",}'),
    "in braces without end": ("row-broken", b'{"a":' * 50_000),
    "with a name twice": ("", b'{"file_name": "no.jpg", "file_name": "good.jpg", "text": "a cat"}'),
    "with more than is asked for": ("", b'{"file_name": "good.jpg", "text": "a cat", "url": "http://x", "n": [1]}'),
    "with a carriage return": ("", b'{"file_name": "good.jpg", "text": "a cat"}\r'),
    "without a caption": ("text-missing", b'{"file_name": "good.jpg"}'),
    "of an image that is not there": ("image-missing", b'{"file_name": "none.jpg", "text": "a cat"}'),
    "of a folder": ("image-unreadable", b'{"file_name": "images/", "text": "a cat"}'),
    "of the root": ("image-missing", b'{"file_name": ".", "text": "a cat"}'),
    "of a dot and a name": ("", b'{"file_name": "./images/good.jpg", "text": "a cat"}'),
    "of a name too long": ("image-unreadable", json.dumps({"image": "a" * 300 + "/x.jpg", "text": "a"}).encode()),
    "of levels too many": ("image-unreadable", json.dumps({"image": "d/" * 3000 + "x.jpg", "text": "a"}).encode()),
    "of a leaf too long": ("image-missing", json.dumps({"image": "a" * 5000, "text": "a"}).encode()),
    "of half a pair in a name": ("image-missing", b'{"image": "\\ud83d.jpg", "text": "a"}'),
    "of half a pair in a folder": ("image-missing", b'{"image": "\\ud83d/x.jpg", "text": "a"}'),
    "of an address": ("image-missing", b'{"image": "http://127.0.0.1/x.jpg", "text": "a"}'),
    "of a file's address": ("image-missing", b'{"image": "file:///etc/passwd", "text": "a"}'),
    "of a home": ("image-missing", b'{"image": "~/secret.jpg", "text": "a"}'),
    "of a variable": ("image-missing", b'{"image": "$HOME/secret.jpg", "text": "a"}'),
    "of a pattern": ("image-missing", b'{"image": "*.jpg", "text": "a"}'),
    "of a share": ("unsafe-name", b'{"image": "\\\\\\\\host\\\\x.jpg", "text": "a"}'),
    "of a name that is a number": ("unsafe-name", b'{"image": 17, "text": "a"}'),
    "of a name that is a list": ("unsafe-name", b'{"image": ["good.jpg"], "text": "a"}'),
    "of a name of spaces": ("unsafe-name", b'{"image": "   ", "text": "a"}'),
    "of UTF-16": ("row-encoding row-encoding", '{"image": "good.jpg"}'.encode("utf-16") + b"\n\xff"),
    "longer than may be": ("row-overlong", b"[" * (MAX_LINE_BYTES + 10)),
}

TABLES: dict[str, tuple[str, bytes]] = {
    "a table with a heading": ("", b"file_name\tcaption\ngood.jpg\ta cat\n"),
    "a table without one": ("", b"good.jpg\ta cat\nother.jpg\ta dog"),
    "a table with its columns turned round": ("", b"text\timage\na cat\tgood.jpg\n"),
    "a table with a byte order mark": ("", b"\xef\xbb\xbffile_name\tcaption\ngood.jpg\ta cat\n"),
    "a table of carriage returns": ("", b"file_name\tcaption\r\ngood.jpg\ta cat\r\n"),
    "a table with empty lines": ("", b"\n\n\ngood.jpg\ta cat\n\n\n"),
    "a table with cells too many": ("", b"good.jpg\ta cat\tand\tmore\n"),
    "a table with a cell too few": ("row-type", b"good.jpg\ta cat\nother.jpg\n"),
    "a table of commas": ("row-type", b"good.jpg\ta cat\nother.jpg,a dog\n"),
    "a table with an empty caption": ("text-empty", b"good.jpg\ta cat\nother.jpg\t\n"),
    "a table with an empty name": ("unsafe-name", b"good.jpg\ta cat\n\ta dog\n"),
    "a table with a zero byte": ("unsafe-name", b"good.jpg\ta cat\na\0b\ta dog\n"),
    "a table of Latin letters": ("row-encoding", b"good.jpg\ta cat\nother.jpg\tK\xe4tzchen\n"),
    "a table that leaves its folder": ("unsafe-name", b"good.jpg\ta cat\n../../etc/passwd\ta dog\n"),
    "a table with a heading twice": ("image-missing", b"file_name\tcaption\ngood.jpg\ta cat\nfile_name\tcaption\n"),
    "a table of a thousand bad rows": ("(row-type ?){1000}", b"good.jpg\ta cat\n" + b"x\n" * 1000),
}

REFUSED: dict[str, tuple[str, bytes]] = {
    "a table of nothing": ("the split is empty", b""),
    "a table of a heading alone": ("the split is empty", b"file_name\tcaption\n"),
    "a table in UTF-16": ("items cannot be used", "good.jpg\ta cat\n".encode("utf-16")),
    "a table that is a zip": ("items cannot be used", b"PK\x03\x04" + b"\xff\xfe\n" * 100),
    "a table of old Macs": ("items cannot be used", b"file_name\tcaption\x0dgood.jpg\ta cat\x0d"),
}
