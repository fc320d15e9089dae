"""The results on disk: one line of JSON an item, written and flushed as soon as it is there."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = "gpu.jsonl"
GROUP = "(group)"  # the item that stands for what is said of a group itself
Line = dict[str, Any]


def digest() -> str:
    """Of the code that results depend on: with other code an item is done anew."""
    code = hashlib.sha256()
    for folder in ("kernels", "core", "bench/gpu"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            code.update(file.read_bytes())
    return code.hexdigest()[:12]


def append(out: Path, line: Line) -> None:
    """At once, so that a process or machine that goes away leaves what it had."""
    with (out / FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(out: Path) -> Iterator[Line]:
    """Every whole line."""
    path = out / FILE
    yield from parsed(path.read_text() if path.exists() else "")


def parsed(whole: str) -> Iterator[Line]:
    """Every whole line of the text."""
    for text in filter(None, whole.splitlines()):
        try:
            yield json.loads(text)
        except ValueError:  # cut off by a machine that went away
            continue


def of_code(out: Path, code: str) -> dict[tuple[str, str, str], Line]:
    """The last line of every item by part, group and name, of the code with this digest."""
    found = (line for line in read(out) if line.get("code") == code)
    return {(line["part"], line["group"], line["item"]): line for line in found}
