"""Reads files that others wrote: plain files alone, of a bounded size, JSON of a bounded depth.

A pipe or a device in a file's place would keep the reader waiting for ever, and a file without end would fill its
memory; both are refused in one line instead.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from optima.limits import MAX_JSON_BYTES, MAX_SHOWN_CHARACTERS
from optima_core.errors import OptimaError


def shown(text: object, most: int = MAX_SHOWN_CHARACTERS) -> str:
    """A text as a message may show it: its beginning and its end if it is long."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[: most - 40]} ... {whole[-30:]}"


def read_file(path: Path, what: str, most: int = MAX_JSON_BYTES) -> bytes:
    """The content of a plain file.

    Args:
        path: the file.
        what: what messages call it, such as "vocabulary".
        most: bytes above which it is refused.

    Raises:
        OptimaError: if it does not exist, cannot be read, is no plain file, or is too large.
    """
    try:
        # A pipe that is opened without O_NONBLOCK waits for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OptimaError(f"{what} {shown(path)} is no plain file")
            if status.st_size > most:
                raise OptimaError(f"{what} {shown(path)} has {status.st_size} bytes; {most} are the most")
            return file.read(status.st_size)
    except FileNotFoundError as error:
        raise OptimaError(f"{what} {shown(path)} does not exist") from error
    except OSError as error:
        raise OptimaError(f"{what} {shown(path)} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise OptimaError(f"{what} {shown(path)} cannot be read: {error}") from error


def parse_json(content: bytes | str, what: str) -> Any:
    """JSON, with or without a byte order mark. Raises OptimaError if it is none."""
    try:
        return json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except RecursionError as error:
        raise OptimaError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise OptimaError(f"{what} is no JSON ({error})") from error


def read_json(path: Path, what: str, most: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file. Raises OptimaError as `read_file` and `parse_json` do."""
    return parse_json(read_file(path, what, most), f"{what} {shown(path)}")
