"""Checkpoints that survive a crash at any instant.

A checkpoint is written aside, synced, and renamed into place, so that a reader sees the old one or the new one. The
newest two or more are kept: if the newest cannot be read, the one before is taken, with a warning.
"""

import io
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from optima_core.errors import OptimaError

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
    """The checkpoints of one run: `step-000000123.pt` files of tensors, numbers, strings, and containers of them."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        """keep: how many of the newest checkpoints stay on disk, at least 1."""
        self.directory = directory
        self.keep = keep

    def paths(self) -> list[Path]:
        """The checkpoints on disk, oldest first."""
        return sorted(path for path in self.directory.glob("step-*.pt") if _NAME.fullmatch(path.name))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the state of a step, then drops the checkpoints beyond `keep`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.directory / f"step-{step:09d}.pt"
        write_atomically(path, buffer.getvalue())
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest readable state, or None if there is no checkpoint at all.

        Raises OptimaError if there are checkpoints and none can be read.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                warnings.warn(f"checkpoint {path} cannot be read ({reason}); trying the one before", stacklevel=2)
            else:
                return state
        if paths:
            raise OptimaError(
                f"none of the {len(paths)} checkpoints in {self.directory} can be read; start the run afresh"
            )
        return None
