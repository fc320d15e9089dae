"""The files of one distillation run, and what must hold of them so that nothing saved is ever lost.

config.yaml        the resolved configuration
metrics.jsonl      a row a round
checkpoints/       what `--resume` continues from
student.safetensors, words.json, summary.json, samples.json, samples/, report.html    written at the end
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml

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
        if occupied and not (path / "config.yaml").exists() and not self.checkpoints.paths():
            raise OptimaError(f"directory {path} holds something, but no run to resume; give another with --run")
        self.metrics = path / "metrics.jsonl"

    def write_config(self, config: Any) -> None:
        """Writes config.yaml, the dataclass `config` as `--config` takes it; a later reader starts the run anew."""
        values = plain(config)
        values["resume"] = False
        self.write_text("config.yaml", yaml.safe_dump(values, sort_keys=False))

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
                file.flush()
                os.fsync(file.fileno())  # a checkpoint of this round must not outlive its row
        except OSError as error:
            raise OptimaError(
                f"cannot write {self.metrics}: {error.strerror}; the last checkpoint is intact, continue with --resume"
            ) from error

    def metrics_rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return [json.loads(row) for row in self.metrics.read_text(encoding="utf-8").splitlines()]

    def cut_metrics(self, rounds: int) -> None:
        """Drops the rows of rounds after the first `rounds`, which a resumed run will write again."""
        if self.metrics.exists():
            rows = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            self.write_text(self.metrics.name, "".join(row for row in rows[:rounds] if row.endswith("\n")))

    def refuse_other_run(self, config: Any, saved: str) -> None:
        """Raises OptimaError if `saved`, the `fingerprint` of the run in this directory, is not that of `config`."""
        ours, theirs = json.loads(fingerprint(config)), json.loads(saved)
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                raise OptimaError(
                    f"cannot resume {self.path}: {name} was {theirs.get(name)} there and is {ours.get(name)} now; "
                    "give the same configuration, or a new directory with --run"
                )


def fingerprint(config: Any) -> str:
    """What a resumed run must share with its earlier part: a JSON object from dotted name to value."""
    values = plain(config)
    for name in (
        "run",
        "resume",
        "quiet",
        "parallel",
        "report",
        "tensorboard",
        "threads",
        "checkpoint_every",
        "keep",
        "log_every",
    ):
        values.pop(name, None)
    return json.dumps(flat(values), sort_keys=True)


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as YAML and JSON take it: dictionaries, lists, texts and numbers."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one from dotted name to value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
