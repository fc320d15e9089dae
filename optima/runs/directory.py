"""The files of one run, and what must hold of them so that nothing saved is ever lost.

config.yaml          the resolved configuration; with it a run has begun
start.safetensors    the student before distillation
metrics.jsonl        a row a round
checkpoints/         what `--resume` continues from
student.safetensors, words.json, summary.json, samples.json, samples/, report.html    written at the end
"""

import contextlib
import fcntl
import json
import os
import warnings
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import yaml

from optima.limits import MAX_CONFIG_BYTES
from optima.plain_yaml import load_yaml
from optima.runs.reading import CONFIG, METRICS, read_round
from optima.runs.rows import Round, plain
from optima.untrusted import read_file
from optima_core.checkpoint import CheckpointStore, write_atomically
from optima_core.errors import OptimaError
from optima_core.processes import launcher

CHECKPOINTS = "checkpoints"
START = "start.safetensors"
REJECTED = "rejected.jsonl"
LOCK = ".lock"

_LAST_BITS = ("threads", "engine.teacher_ahead")
"""Options that a resumed run may change, and that change the order of sums."""

_LOCKS: "weakref.WeakSet[TextIO]" = weakref.WeakSet()


def _release_in_child() -> None:
    """A loader's worker process must not hold the lock on when the run is killed."""
    for file in _LOCKS:
        file.close()


os.register_at_fork(after_in_child=_release_in_child)


class RunDirectory:
    """A run's directory: new and empty, or, with `resume`, one that holds an earlier part of the same run.

    What the same torchrun began before it started its processes anew is resumed without being asked to.

    It is locked for as long as it is entered, or alive. Hidden files do not count, nor does what a run leaves that is
    killed before it begins: unfinished files, a start, a list of rejected images. After an error before it begins the
    directory is as it was, but for that list.
    """

    def __init__(self, path: Path, *, resume: bool, keep: int) -> None:
        """keep: how many checkpoints stay on disk.

        Raises OptimaError if the directory cannot be written to, another process uses it, it holds something and is
        not to be resumed, or there is nothing to resume.
        """
        self.path = path
        self.checkpoints = CheckpointStore(path / CHECKPOINTS, keep)
        self.metrics = path / METRICS
        if resume and not path.exists():
            raise OptimaError(
                f"run directory {path} does not exist, so there is nothing to resume; give the run's with --run"
            )
        resume = resume or (self._begun() and _locked_by(path) == launcher() != "")
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(not _left_behind(name) for name in os.listdir(path))
            self._lock = _lock(path) if not occupied or (path / LOCK).exists() else None
            self._refuse_occupied(occupied, resume)
            self._lock = self._lock or _lock(path)
            self._lock.write(f"{launcher()}\n")  # not before: a restart resumes what bears its launcher's name
            self._lock.flush()
        except OSError as error:
            raise OptimaError(
                f"run directory {path} cannot be written to ({error.strerror}); give another with --run"
            ) from error
        if not occupied:
            self._tidy(START, REJECTED)

    def _refuse_occupied(self, occupied: bool, resume: bool) -> None:
        if occupied and not resume:
            raise OptimaError(
                f"run directory {self.path} is not empty; continue it with --resume, or give a new directory with --run"
            )
        if occupied and not self._begun():
            raise OptimaError(f"directory {self.path} holds something, but no run to resume; give another with --run")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._begun():
            self._tidy(START, LOCK)
            for folder in self._made:
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()
        if self._lock is not None:
            self._lock.close()

    def _begun(self) -> bool:
        return (self.path / CONFIG).exists() or bool(self.checkpoints.paths())

    def _tidy(self, *names: str) -> None:
        """Removes some of what a run that never began has left, and its unfinished files."""
        for name in os.listdir(self.path):
            if name in names or name.endswith(".part"):
                (self.path / name).unlink(missing_ok=True)

    def write_config(self, config: Any) -> None:
        """Writes config.yaml, the dataclass `config` as `--config` takes it; a later reader starts the run anew.

        Warns if what was there named other threads: sums in another order have other last bits.
        """
        values = plain(config)
        values["resume"] = False
        before, now = self._earlier_config(), flat(values)
        for name in _LAST_BITS:
            if name in before and name in now and before[name] != now[name]:
                warnings.warn(
                    f"{self.path}: {name} was {before[name]} and is {now[name]} now; the last bits of what follows may "
                    "differ from those of an uninterrupted run",
                    stacklevel=2,
                )
        self.write_text(CONFIG, yaml.safe_dump(values, sort_keys=False))

    def _earlier_config(self) -> dict[str, Any]:
        """What config.yaml holds; nothing if there is none that can be read."""
        path = self.path / CONFIG
        with contextlib.suppress(OptimaError, ValueError):
            values = load_yaml(read_file(path, "config", MAX_CONFIG_BYTES).decode(), "config")
            return flat(values) if isinstance(values, dict) else {}
        return {}

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file of the directory, atomically."""
        write_atomically(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a JSON file of the directory, atomically."""
        self.write_text(name, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")

    def append_round(self, row: Round) -> None:
        """Adds a row to metrics.jsonl."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row)) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint of this round must not outlive its row
        except OSError as error:
            raise OptimaError(
                f"cannot write {self.metrics}: {error.strerror}; the last checkpoint is intact, continue with --resume"
            ) from error

    def rounds(self, done: int) -> list[Round]:
        """The rows of the first `done` rounds, as far as metrics.jsonl has them; the others, to be written anew, go.

        Warns of rows that cannot be read and of rounds that are missing or there twice: a run goes on without them.
        """
        found: dict[int, Round] = {}
        text = self.metrics.read_text(encoding="utf-8", errors="replace") if self.metrics.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = read_round(line, f"{self.metrics} line {number}")
            except OptimaError as error:
                warnings.warn(f"{error}; the row is dropped", stacklevel=2)
                continue
            if row.round in found and row.round <= done:
                warnings.warn(f"{self.metrics} line {number}: round {row.round} once more; it is dropped", stacklevel=2)
            found.setdefault(row.round, row)
        missing = [str(number) for number in range(1, done + 1) if number not in found]
        if missing:
            warnings.warn(f"{self.metrics} lacks round {', '.join(missing)}; so will the report", stacklevel=2)
        kept = [found[number] for number in sorted(found) if number <= done]
        if text or missing:
            self.write_text(METRICS, "".join(json.dumps(plain(row)) + "\n" for row in kept))
        return kept

    def refuse_other_run(self, config: Any, saved: str) -> None:
        """Raises OptimaError if `saved`, the `fingerprint` of the run in this directory, is not that of `config`."""
        ours, theirs = json.loads(fingerprint(config)), json.loads(saved)
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                raise OptimaError(
                    f"cannot resume {self.path}: {name} was {theirs.get(name)} there and is {ours.get(name)} now; "
                    "leave the option out, or give a new directory with --run"
                )


def _left_behind(name: str) -> bool:
    return name.startswith(".") or name.endswith(".part") or name in (START, REJECTED)


def _locked_by(path: Path) -> str:
    """The launcher of the process whose run the directory was last."""
    try:
        return (path / LOCK).read_text(encoding="utf-8").partition("\n")[2].strip()
    except OSError:
        return ""


def _lock(path: Path) -> TextIO:
    """The open file whose lock keeps other processes away; it holds the number of this one."""
    while True:
        file = open(path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.readline().strip() or "another"
            file.close()
            raise OptimaError(
                f"run directory {path} is in use by process {holder}; wait until that ends, or give another with --run"
            ) from None
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # a run that never began has removed it in between: the lock of a file that nobody else finds
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _LOCKS.add(file)
    return file


def fingerprint(config: Any) -> str:
    """What a resumed run must share with its earlier part: a JSON object from dotted name to value."""
    values = flat(plain(config))
    for name in (
        "run",
        "resume",
        "quiet",
        "parallel",
        "patience",
        "shard_over",
        "report",
        "tensorboard",
        "track",
        "push_to_hub",
        "threads",
        "engine.teacher_ahead",
        "checkpoint_every",
        "keep",
        "log_every",
        "data.index",
    ):
        values.pop(name, None)
    return json.dumps(values, sort_keys=True)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one from dotted name to value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
