"""Checkpoints that survive a crash at any instant.

A checkpoint is written aside, synced, and renamed into place, so that a reader sees the old one or the new one. The
newest two or more are kept: if the newest cannot be read, the one before is taken, with a warning.
"""

import contextlib
import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from optima_core.errors import OptimaError

_DIGEST_SIZE = hashlib.sha256().digest_size
_PIECE = 2**24
_NAME = re.compile(r"step-(\d{9})\.pt")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` at the end; after a crash there is the old one or the new one.

    Raises OptimaError if it cannot be written; nothing has changed then.
    """
    aside = path.with_name(path.name + ".part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OptimaError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file's content; after a crash the file holds the old content or the new one, whole."""
    with replacing(path) as file:
        file.write(content)


class _Digesting:
    """A file to write whose content is digested on the way, so that it need not be in memory as a whole."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """As a binary file's."""
        self.digest.update(content)
        try:
            return self.file.write(content)
        except OSError as error:  # torch.save makes something else of it
            self.error = error
            raise

    def flush(self) -> None:
        """As a binary file's."""
        self.file.flush()


class CheckpointStore:
    """The checkpoints of one run: `step-000000123.pt` files of tensors, numbers, strings, and containers of them.

    A file is what torch.save writes, followed by its SHA-256 digest.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        """keep: how many of the newest checkpoints stay on disk, at least 1."""
        self.directory = directory
        self.keep = keep

    def paths(self) -> list[Path]:
        """The checkpoints on disk, oldest first."""
        return sorted(path for path in self.directory.glob("step-*.pt") if _NAME.fullmatch(path.name))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the state of a step, then drops the checkpoints beyond `keep`."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptimaError(f"cannot make the directory {self.directory}: {error.strerror}") from error
        for unfinished in self.directory.glob("step-*.pt.part"):  # of a run that was killed
            unfinished.unlink(missing_ok=True)
        path = self.directory / f"step-{step:09d}.pt"
        with replacing(path) as file:
            digesting = _Digesting(file)
            try:
                torch.save(state, digesting)  # type: ignore[arg-type]  # it asks for no more than write and flush
            except RuntimeError:
                if digesting.error is None:
                    raise
                raise digesting.error from None
            file.write(digesting.digest.digest())
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self, wanted: Mapping[str, type] | None = None) -> dict[str, Any] | None:
        """The newest readable state, or None if there is no checkpoint at all.

        Args:
            wanted: what a state must hold: key -> type. One that does not counts as unreadable.

        Raises OptimaError if there are checkpoints and none can be read.
        """
        damaged: list[str] = []
        for path in reversed(self.paths()):
            try:
                state = _state(_read(path), wanted or {})
            except Exception as error:  # a damaged file may fail in any way
                lines = str(error).strip().splitlines()
                damaged.append(f"checkpoint {path} cannot be read ({lines[0] if lines else type(error).__name__})")
            else:
                for complaint in damaged:
                    warnings.warn(f"{complaint}; {path.name} is taken instead", stacklevel=2)
                return state
        if damaged:
            raise OptimaError(
                f"none of the {len(damaged)} checkpoints in {self.directory} can be read; start the run afresh "
                f"(the newest: {damaged[0]})"
            )
        return None


def load_plain(path: Path) -> Any:
    """What torch.save wrote, on the CPU, if it is tensors, numbers, texts and containers of them; no code is run.

    Raises OptimaError for anything else, and for an archive that unpacks to more than the file holds. A damaged file
    may raise any exception.
    """
    if not path.is_file():
        raise OptimaError("it is no plain file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        # torch.save compresses nothing; what is compressed may unpack to a thousand times its size.
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise OptimaError("it is compressed, which torch.save does not do")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise OptimaError("its parts overlap")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        # torch's own message advises to read the file without this check.
        raise OptimaError("it holds more than tensors and plain values, and reading it could run code") from None


def _read(path: Path) -> Any:
    """torch.load checks nothing: without the digest behind the content a flipped bit would become a weight."""
    if not path.is_file():
        raise OSError("it is no plain file")
    digest, left = hashlib.sha256(), path.stat().st_size - _DIGEST_SIZE
    with open(path, "rb") as file:
        while left > 0:
            piece = file.read(min(left, _PIECE))
            digest.update(piece)
            left -= len(piece)
        if digest.digest() != file.read(_DIGEST_SIZE):
            raise OSError("its SHA-256 digest is wrong")
    # The reader finds the archive's end before the digest.
    return load_plain(path)


def _state(content: Any, wanted: Mapping[str, type]) -> dict[str, Any]:
    """The content, if it is a state that holds what is wanted; raises ValueError otherwise."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__} and no state of a run")
    for name, kind in wanted.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"its {name!r} is {type(content.get(name)).__name__}, {kind.__name__} is wanted")
    return content
