"""The files of one distillation run, and what must hold of them so that nothing saved is ever lost.

config.yaml        the resolved configuration
metrics.jsonl      a row a round
checkpoints/       what `--resume` continues from
student.safetensors, summary.json, samples.json, samples/, report.html    written at the end
"""

import json
from pathlib import Path
from typing import Any

from optima_core.checkpoint import CheckpointStore, write_atomically
from optima_core.errors import OptimaError


class RunDirectory:
    """A run's directory: new and empty, or, with `resume`, one that holds an earlier part of the same run."""

    def __init__(self, path: Path, *, resume: bool, keep: int) -> None:
        """keep: how many checkpoints stay on disk.

        Raises OptimaError if the directory cannot be written to, or holds something and is not to be resumed.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OptimaError(
                f"run directory {path} cannot be written to ({error.strerror}); give another with --run"
            ) from error
        if occupied and not resume:
            raise OptimaError(
                f"run directory {path} is not empty; continue it with --resume, or give a new directory with --run"
            )
        self.checkpoints = CheckpointStore(path / "checkpoints", keep)
        self.metrics = path / "metrics.jsonl"

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file of the directory, atomically."""
        write_atomically(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a JSON file of the directory, atomically."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one row to metrics.jsonl."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OptimaError(
                f"cannot write {self.metrics}: {error.strerror}; the last checkpoint is intact, continue with --resume"
            ) from error

    def cut_metrics(self, rounds: int) -> None:
        """Drops the rows of rounds after the first `rounds`, which a resumed run will write again."""
        if self.metrics.exists():
            rows = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            self.write_text(self.metrics.name, "".join(row for row in rows[:rounds] if row.endswith("\n")))
