"""Checkpoints that survive a crash at any instant.

A checkpoint is written aside, synced, and renamed into place, so that a reader sees the old one or the new one. The
newest two or more are kept: if the newest cannot be read, the one before is taken, with a warning.
"""

import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from optima_core.errors import OptimaError

_DIGEST_SIZE = hashlib.sha256().digest_size
_NAME = re.compile(r"step-(\d{9})\.pt")


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file's content; after a crash the file holds the old content or the new one, whole."""
    aside = path.with_name(path.name + ".part")
    try:
        with open(aside, "wb") as file:
            file.write(content)
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
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.directory / f"step-{step:09d}.pt"
        content = buffer.getvalue()
        write_atomically(path, content + hashlib.sha256(content).digest())
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest readable state, or None if there is no checkpoint at all.

        Raises OptimaError if there are checkpoints and none can be read.
        """
        damaged: list[str] = []
        for path in reversed(self.paths()):
            try:
                state = _read(path)
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


def _read(path: Path) -> dict[str, Any]:
    """torch.load checks nothing: without the digest behind the content a flipped bit would become a weight."""
    whole = path.read_bytes()
    content, digest = whole[:-_DIGEST_SIZE], whole[-_DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        raise OSError("its SHA-256 digest is wrong")
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state
