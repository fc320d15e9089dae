"""Killed, or out of disk, just before any change of a file: the same command then comes to the same bits and files.

An instant is what Python tells its audit hooks before it opens a file to write, makes, renames or removes one. One harm
at one instant of each command is drawn; OPTIMA_INSTANTS says how many are to be drawn of every harm, and "all" takes
all of them. Only then `compare` takes part, whose runs are processes of their own.
"""

import errno
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from boxed import Ended, run_command
from jobs import Job, jobs, results, write_images
from tiny import tiny_model
from warm import import_everything

from optima.coca.checkpoint import save_coca
from optima.run import main
from optima.tasks.pictograms import HEADS

INSTANTS = os.environ.get("OPTIMA_INSTANTS", "")
HARMS = ("killed", "no space", "cut short")
MORE_BYTES = 3 * 2**30
MOST = 300.0
"""Seconds of a command; alone on a machine they take one to ten."""

JOBS = {job.name: job for job in jobs() if INSTANTS or job.name == "distill"}
GROWING = ("open", "os.mkdir")
CHANGING = (*GROWING, "os.rename", "os.remove", "os.rmdir", "os.truncate")


class Instant(NamedTuple):
    """A change of a file: the audit event, the path below what is watched, and whether a file is begun anew."""

    event: str
    path: str
    anew: bool


class Watch:
    """An audit hook: tells of changes below a folder, and lets one of them, and all that follow, come to harm."""

    def __init__(self, place: Path, told: int, harm: str, at: int) -> None:
        """told: file descriptor that the instants are written to."""
        self.place, self.told, self.harm, self.at = os.fspath(place), told, harm, at
        self.count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGING or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        paths = [os.fsdecode(found) for found in arguments if isinstance(found, str | bytes | os.PathLike)]
        if not any(path.startswith(self.place) for path in paths):
            return
        self.count += 1
        anew = event == "open" and not arguments[2] & os.O_APPEND
        os.write(self.told, json.dumps((event, os.path.relpath(paths[0], self.place), anew)).encode() + b"\n")
        if self.harm == "killed" and self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.harm == "no space" and self.count >= self.at and event in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), paths[0])


@dataclass(frozen=True)
class Whole:
    """What an undisturbed command comes to: results, names of its files, bytes of the largest, and its instants."""

    results: dict[str, str]
    files: set[str]
    largest: int
    instants: list[Instant]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and models, where the jobs expect them."""
    import_everything()
    root = tmp_path_factory.mktemp("ground")
    write_images(root / "images", 40)
    for name, layers, heads in (("teacher", 2, HEADS), ("student", 1, {})):
        (root / name).mkdir()
        save_coca(tiny_model(layers, heads), root / name / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def whole_of(ground: Path) -> Callable[[Job], Whole]:
    """Runs a command undisturbed, once."""
    found: dict[str, Whole] = {}

    def whole(job: Job) -> Whole:
        if job.name not in found:
            out = ground / f"whole of {job.name}"
            ended, instants = run(job, ground, out)
            assert ended.status == 0, ended.error
            largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
            found[job.name] = Whole(results(job, out), files(out), largest, instants)
        return found[job.name]

    return whole


def files(folder: Path) -> set[str]:
    """Names, without what chance adds to those of a checkpoint's tensors."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {re.sub(r"/(\d{5})-[0-9a-f]{8}\.", r"/\1.", name) for name in names}


def run(job: Job, ground: Path, out: Path, harm: str = "", at: int = 0) -> tuple[Ended, list[Instant]]:
    """Runs a job's command, also as the one that goes on -> how it ended, and its instants."""
    words = job.command(ground, out, again=out.exists())
    told = os.open(ground / "told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def call() -> int:
        if harm == "cut short":
            resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
        else:
            sys.addaudithook(Watch(out, told, harm, at))
        return main(words)

    ended = run_command(call, more_bytes=MORE_BYTES, patience=MOST, most=MOST)
    os.close(told)
    return ended, [Instant(*json.loads(line)) for line in (ground / "told").read_text().splitlines()]


def places(whole: Whole, harm: str, draws: Random) -> list[int]:
    """Instants to try, or sizes above which no file may grow."""
    if harm == "cut short":
        count = 10 if INSTANTS == "all" else int(INSTANTS or 1)
        return [draws.randint(4096, max(4097, whole.largest)) for _ in range(count)]
    every = [at for at, _ in enumerate(whole.instants, 1) if harm == "killed" or needs_room(whole.instants[at - 1 :])]
    return every if INSTANTS == "all" else sorted(draws.sample(every, min(int(INSTANTS or 1), len(every))))


def needs_room(instants: list[Instant]) -> bool:
    return any(instant.event in GROWING for instant in instants)


@pytest.mark.parametrize("harm", HARMS if INSTANTS else ["drawn"])
@pytest.mark.parametrize("name", JOBS)
def test_harm_at_any_instant_costs_nothing(
    name: str, harm: str, ground: Path, whole_of: Callable[[Job], Whole], tmp_path: Path, seed: int
) -> None:
    job, draws = JOBS[name], Random(seed)
    harm = draws.choice(HARMS) if harm == "drawn" else harm
    whole = whole_of(job)
    wrong = []
    for at in places(whole, harm, draws):
        out = tmp_path / f"{at}"
        ended, _ = run(job, ground, out, harm, at)
        complaint = complaint_about(ended, harm)
        if not complaint:
            ended, _ = run(job, ground, out)
            if ended.status != 0:
                complaint = f"then status {ended.status}"
            elif results(job, out) != whole.results:
                complaint = "then other results"
            elif files(out) != whole.files:
                complaint = f"then other files: {sorted(files(out) ^ whole.files)}"
        if complaint:
            wrong.append(f"{harm} at {at} of {len(whole.instants)}: {complaint}: {ended.error[-600:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", JOBS)
def test_files_are_written_under_another_name_or_added_to(name: str, whole_of: Callable[[Job], Whole]) -> None:
    """So that none is ever there in part. Hidden ones have no content."""
    begun = {Path(instant.path) for instant in whole_of(JOBS[name]).instants if instant.anew}
    assert begun
    assert {path for path in begun if path.suffix not in (".part", ".partial") and path.name[0] != "."} == set()


def complaint_about(ended: Ended, harm: str) -> str:
    """What is wrong with how a command that came to harm ended; "" if nothing."""
    if harm == "killed":
        return "" if ended.status == -signal.SIGKILL else f"status {ended.status}, though it was to be killed"
    said = [line for line in ended.error.splitlines() if not line.startswith("optima: warning: ")]
    if ended.status == 0 and harm == "cut short":  # no file was as large
        return ""
    return "" if ended.status == 2 and len(said) == 1 and said[0].startswith("optima: ") else f"status {ended.status}"
