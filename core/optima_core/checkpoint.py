"""Checkpoints that survive a crash at any instant, written by one process or by many ranks together.

A checkpoint is a folder, `step-000000123`: a file of safetensors for each rank, and `manifest.json`, which says where
every tensor is, has all that is no tensor, and the digests of the files and of itself. The manifest is put in its place
last, in one stroke: before, there is no checkpoint, and afterwards all of it is on the disk. The newest two or more are
kept: if the newest cannot be read, the one before is taken, with a warning.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
import torch.distributed as dist
from torch import Tensor

from optima_core.errors import OptimaError
from optima_core.parallel import Ranks
from optima_core.pieces import Pieces, Planner, check_file, join, pieces_from, read_tensors, split, write_tensors

MANIFEST = "manifest.json"
_FORMAT = "optima checkpoint 2"
_PIECE = 2**24
_MAX_MANIFEST_BYTES = 2**30
"""The pieces of ten thousand tensors on a thousand ranks take a third of that."""
_NAME = re.compile(r"step-(\d{9})")


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
        _sync(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OptimaError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file's content; after a crash the file holds the old content or the new one, whole."""
    with replacing(path) as file:
        file.write(content)


@dataclass(frozen=True)
class Saved:
    """A checkpoint, or a part of one, that was found whole; its tensors are read when they are asked for.

    Attributes:
        state: What was saved, with tensors on the device "meta" in the place of the real ones.
        files: Those that hold the tensors.
        tensors: Where they are, by name.
        path: The keys from the whole state to this part of it.
    """

    state: Any
    files: tuple[Path, ...]
    tensors: Mapping[str, Pieces]
    path: tuple[str, ...] = ()

    def part(self, key: str) -> "Saved":
        """What was saved under this key."""
        return Saved(self.state[key], self.files, self.tensors, (*self.path, key))

    def read(self, into: Any = None) -> Any:
        """The state.

        A tensor that `into` has in the same place is filled, whatever its device and however it is spread over the
        ranks, and is part of the result; the others come whole, on the CPU.

        Raises ValueError if one in `into` is of another shape.
        """
        tree, wanted = split(self.state, self.path)
        _, given = split(into, self.path)
        targets = {
            name: given[name] if name in given else torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in wanted.items()
        }
        read_tensors(self.files, self.tensors, targets)
        return join(tree, targets, self.path)


@dataclass(frozen=True)
class _File:
    """A file of a rank, as the manifest knows it."""

    name: str
    sha256: str


class CheckpointStore:
    """The checkpoints of one run: tensors, numbers, texts, None, and lists and dicts (by text) of them.

    Args:
        directory: Where they are; all ranks must see it.
        keep: How many of the newest stay on disk, at least 1.
        ranks: The processes of the run. All of them must make a store, and save and load at the same time.
        asynchronous: `save` returns when the operating system has taken everything; the run, which may change its
            tensors from then on, goes on while the system brings it onto the disk and the ranks agree that it is there.
    """

    def __init__(
        self, directory: Path, keep: int = 2, ranks: Ranks | None = None, *, asynchronous: bool = False
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.ranks = ranks or Ranks()
        self._planner = Planner(self.ranks)
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        # The other thread's messages must not get among those of the run.
        apart = asynchronous and self.ranks.count > 1
        self._group = dist.new_group(backend="gloo") if apart else None
        self._unfinished: Future[None] | None = None

    def paths(self) -> list[Path]:
        """The checkpoints on disk, oldest first."""
        folders = (path.parent for path in self.directory.glob(f"step-*/{MANIFEST}"))
        return sorted(folder for folder in folders if _NAME.fullmatch(folder.name))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Saves the state of a step, then drops the checkpoints beyond `keep`.

        What is no tensor is saved as the first rank has it. No more than some 30 MiB are needed beside the tensors,
        however large they are and wherever.

        Raises OptimaError if it cannot be written, or the one before, ended meanwhile, could not. ValueError if the
        state holds something else.
        """
        self.wait()
        folder = self.directory / f"step-{step:09d}"
        tree, tensors = split(state)
        written, layout = self._planner.plan(tensors)
        if self.ranks.first:
            self._tidy(folder)
        begun = _outcome(lambda: self._begin_file(folder, written))
        if self._thread is None:
            self._end(folder, tree, begun, layout)
        else:
            self._unfinished = self._thread.submit(self._end, folder, tree, begun, layout)

    def wait(self) -> None:
        """Waits until what was saved is on the disk. Raises what `save` raises."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.result()

    def tidy(self) -> None:
        """Drops the checkpoints beyond `keep` at a run's end: a kill in its last save may have left more than that."""
        self.wait()
        if self.ranks.first:
            self._tidy()

    def close(self) -> None:
        """Waits, and lets the thread go; errors are told by `wait`, which is to be called before."""
        if self._thread is not None:
            self._thread.shutdown()

    def load(self, wanted: Mapping[str, type] | None = None) -> dict[str, Any] | None:
        """The newest state that can be read, whole, on the CPU; see `newest`."""
        saved = self.newest(wanted)
        return None if saved is None else dict(saved.read())

    def newest(self, wanted: Mapping[str, type] | None = None) -> Saved | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        Args:
            wanted: what a state must hold: key -> type. One that does not counts as damaged.

        Raises OptimaError if there are checkpoints and none can be read.
        """
        damaged: list[str] = []
        for path in reversed(self.ranks.broadcast(self.paths())):
            complaint, saved = None, None
            try:
                saved = self._open(path, wanted or {})
            except Exception as error:  # a damaged file may fail in any way
                lines = str(error).strip().splitlines()
                complaint = f"checkpoint {path} cannot be read ({lines[0] if lines else type(error).__name__})"
            complaints = [found for found in self.ranks.gather(complaint) if found]
            if saved is not None and not complaints:
                for found in damaged if self.ranks.first else ():
                    warnings.warn(f"{found}; {path.name} is taken instead", stacklevel=2)
                return saved
            damaged += complaints[:1]
        if damaged:
            raise OptimaError(
                f"none of the {len(damaged)} checkpoints in {self.directory} can be read; start the run afresh "
                f"(the newest: {damaged[0]})"
            )
        if any(self.directory.glob("step-*.pt")):
            raise OptimaError(
                f"the checkpoints in {self.directory} are of a version of optima that kept each in one file (.pt); end "
                "the run with that version, or start it afresh"
            )
        return None

    def _open(self, folder: Path, wanted: Mapping[str, type]) -> Saved:
        """Reads the manifest and this rank's share of the files. Raises any exception if something is amiss."""
        content = _read_manifest(folder / MANIFEST)
        files = [_File(**found) for found in content["files"]]
        tensors = {name: pieces_from(found, len(files)) for name, found in content["tensors"].items()}
        for number in range(self.ranks.rank, len(files), self.ranks.count):
            path = folder / files[number].name
            if path.parent != folder or not path.is_file():
                raise OSError(f"its {files[number].name} is no plain file")
            if _digest(path) != files[number].sha256:
                raise OSError(f"the SHA-256 digest of {path.name} is wrong")
            check_file(path, number, tensors)
        blank = {name: torch.empty(found.shape, dtype=found.dtype, device="meta") for name, found in tensors.items()}
        state = join(content["state"], blank)
        if not isinstance(state, dict):
            raise ValueError(f"it holds {type(state).__name__} and no state of a run")
        for name, kind in wanted.items():
            if not isinstance(state.get(name), kind):
                raise ValueError(f"its {name!r} is {type(state.get(name)).__name__}, {kind.__name__} is wanted")
        return Saved(state, tuple(folder / file.name for file in files), tensors)

    def _begin_file(self, folder: Path, written: dict[str, Tensor]) -> "_Begun":
        """Hands what this rank writes over to the operating system."""
        # Of another name than in an earlier attempt at this step, so that none is ever half of this and half of that.
        path = folder / f"{self.ranks.rank:05d}-{secrets.token_hex(4)}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptimaError(f"cannot make the directory {folder}: {error.strerror}") from error
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(replacing(path))
            with _Digesting(file) as digesting:
                write_tensors(digesting, written)  # type: ignore[arg-type]  # it asks for no more than write
            return _Begun(_File(path.name, digesting.digest.hexdigest()), stack.pop_all())

    def _end(self, folder: Path, tree: Any, begun: "_Begun | OptimaError", layout: dict[str, Pieces]) -> None:
        """Puts this rank's file in its place; of those of all ranks the first one makes a checkpoint."""
        try:
            files = self._together(begun if isinstance(begun, OptimaError) else _outcome(begun.end))
            committed = _outcome(lambda: self._commit(folder, tree, files, layout)) if self.ranks.first else None
            self._together(committed)
        except OptimaError:
            if self.ranks.first and not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _commit(self, folder: Path, tree: Any, files: list[_File], layout: dict[str, Pieces]) -> None:
        content = {
            "format": _FORMAT,
            "files": [vars(file) for file in files],
            "tensors": {name: tensor.described() for name, tensor in layout.items()},
            "state": tree,
        }
        write_atomically(folder / MANIFEST, json.dumps({"sha256": _digest_of(content), **content}).encode())
        _sync(self.directory)
        for path in folder.iterdir():  # of an earlier attempt at this step
            if path.name not in {MANIFEST, *(file.name for file in files)}:
                path.unlink(missing_ok=True)
        self._tidy(folder)

    def _together(self, outcome: Any) -> list[Any]:
        """The outcome of every rank's work. Raises the OptimaError of any rank, on all of them."""
        outcomes = [outcome] * self.ranks.count
        if self.ranks.count > 1:
            dist.all_gather_object(outcomes, outcome, group=self._group)
        for found in outcomes:
            if isinstance(found, OptimaError):
                raise found
        return outcomes

    def _tidy(self, current: Path | None = None) -> None:
        """Drops the checkpoints beyond `keep`, and what killed or failed runs left of others than the current one."""
        kept = {*self.paths()[-self.keep :], current}
        for folder in self.directory.glob("step-*"):
            if _NAME.fullmatch(folder.name) and folder not in kept:
                # Without a manifest it is no checkpoint, whatever else of it a crash may leave.
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Begun:
    """A file that the operating system has, and that is to be put in its place."""

    file: _File
    rest: contextlib.ExitStack

    def end(self) -> _File:
        """Raises OptimaError if it does not come onto the disk."""
        self.rest.close()
        return self.file


class _Digesting:
    """A file to write whose content is digested on the way: while the next piece is fetched, by another thread."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "digest")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def write(self, content: bytes) -> int:
        """As a binary file's; the content may be looked at until the next piece is written, or the end."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._thread.submit(self.digest.update, content)
        return self.file.write(content)


def _outcome(work: Callable[[], Any]) -> Any:
    """What the work gives, or the OptimaError that it raises: what other ranks must hear of."""
    try:
        return work()
    except OptimaError as error:
        return error


def _sync(directory: Path) -> None:
    """Makes sure that a crash of the machine does not undo what was renamed or made in the directory."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises OSError or ValueError if it is none, or its digest is wrong."""
    if not path.is_file():
        raise OSError(f"its {MANIFEST} is no plain file")
    size = path.stat().st_size
    if size > _MAX_MANIFEST_BYTES:
        raise OSError(f"its {MANIFEST} has {size} bytes; {_MAX_MANIFEST_BYTES} are the most")
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest_of(content):
        raise ValueError(f"the SHA-256 digest of its {MANIFEST} is wrong")
    if content.get("format") != _FORMAT:
        raise ValueError(f"it is no {_FORMAT}")
    return content
