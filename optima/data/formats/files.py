"""What the readers share: finding files under a data root, and JSON that may be broken."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from optima.data.record import Collector, ImageFolder, ImageSource, Unusable
from optima.limits import MAX_LINE_BYTES
from optima.untrusted import read_file
from optima_core.errors import OptimaError


def find(root: Path, candidates: Sequence[str]) -> Path | None:
    """The first of the relative paths that exists under the root; raises OptimaError if it is no plain file."""
    found = next((root / name for name in candidates if (root / name).exists()), None)
    if found is not None and not found.is_file():
        raise OptimaError(f"{found} is no plain file")
    return found


def find_or_refuse(root: Path, candidates: Sequence[str], what: str) -> Path:
    """As `find`; raises OptimaError that names all that was looked for."""
    found = find(root, candidates)
    if found is None:
        raise OptimaError(f"{root} lacks {what}: {' or '.join(candidates)}")
    return found


def read_json(path: Path) -> Any:
    """A whole JSON file. Raises OptimaError if it is none: without it there is nothing to go on with."""
    try:
        return json.loads(read_file(path, "annotations").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise OptimaError(f"{path} is not a JSON file ({error}); download it again") from error


def rows_of(content: Any, name: str, path: Path) -> list[Any]:
    """A list that a JSON file must hold. Raises OptimaError if it does not."""
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise OptimaError(f"{path} holds no list {name!r}; is it the file that its name says?")
    return rows


def read_lines(path: Path, collector: Collector) -> Iterator[tuple[str, Any]]:
    """The objects of a JSONL file, each with where it stands; a broken line is rejected and passed over."""
    for where, line in text_lines(path, collector):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            collector.reject(where, Unusable("row-broken", f"the line is not JSON: {error}"))
        else:
            yield where, row


def text_lines(path: Path, collector: Collector) -> Iterator[tuple[str, str]]:
    """The lines of a UTF-8 file that are not blank, each with where it stands; another encoding is rejected."""
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            where = f"{path.name}:{number}"
            if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                collector.reject(where, Unusable("row-overlong", f"the line has more than {MAX_LINE_BYTES} bytes"))
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                continue
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                collector.reject(where, Unusable("row-encoding", f"the line is not UTF-8: {error.reason}"))
                continue
            if line.strip():
                yield where, line


class ImageFolders:
    """The images of several folders, tried in turn; those that do not exist are passed over.

    Raises OptimaError if none exists.
    """

    def __init__(self, root: Path, candidates: Iterable[str]) -> None:
        names = list(candidates)
        self._folders = [ImageFolder(root / name) for name in names if (root / name).is_dir()]
        if not self._folders:
            raise OptimaError(f"{root} lacks the images: folder {' or '.join(names)}")

    def source(self, *names: Any) -> ImageSource:
        """The image of the first name that is in any folder. Raises Unusable for the first name if there is none."""
        fault: Unusable | None = None
        for folder in self._folders:
            for name in names:
                try:
                    return folder.source(name)
                except Unusable as found:
                    fault = fault or found
        assert fault is not None
        raise fault
