"""Runs cases and commands in forked children, with bounds on their memory and their time."""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


def run_boxed(
    cases: Sequence[str], run: Callable[[int], Any], *, more_bytes: int, seconds: float
) -> Iterator[tuple[str, Any]]:
    """What `run(i)` returned for each case, in order, as JSON carries it.

    A case that ends the child, exceeds its time or raises is reported as a text that begins with "died", "hung" or
    "raised"; a new child goes on with the next.

    Args:
        cases: names, for messages.
        run: runs a case by its place.
        more_bytes: address space that a child may take beyond what it begins with.
        seconds: time of a case.
    """
    done = 0
    while done < len(cases):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(writing, range(done, len(cases)), run, more_bytes)
        os.close(writing)
        failure = ""
        with open(reading, "rb", buffering=0) as pipe:
            buffer = b""
            while not failure and done < len(cases):
                if b"\n" not in buffer:
                    ready, _, _ = select.select([pipe], [], [], seconds)
                    piece = pipe.read(2**16) if ready else b""
                    failure = "" if piece else "died" if ready else f"hung for more than {seconds:g} s"
                    buffer += piece
                    continue
                line, _, buffer = buffer.partition(b"\n")
                yield cases[done], json.loads(line)
                done += 1
        if failure.startswith("hung"):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if failure:
            yield cases[done], f"{failure} (status {status})"
            done += 1


def _child(pipe: int, places: Sequence[int], run: Callable[[int], Any], more_bytes: int) -> None:
    _bound(more_bytes)
    for place in places:
        try:
            found = run(place)
        except BaseException:
            found = f"raised {traceback.format_exc(limit=-4)}"
        os.write(pipe, json.dumps(found).encode() + b"\n")
    os._exit(0)


class Ended(NamedTuple):
    """How a command ended: exit status (or minus a signal), output, seconds of work, whether it was told to stop."""

    status: int
    out: str
    error: str
    seconds: float
    stopped: bool


def run_command(call: Callable[[], int], *, more_bytes: int, patience: float, most: float) -> Ended:
    """Runs a command in a forked child, and ends what it leaves behind.

    Its seconds are those that it and what it started computed, so that a busy machine makes nothing look slow; thirty
    that it only waited count as one.

    Args:
        call: returns the exit status.
        more_bytes: address space that the child may take beyond what it begins with.
        patience: seconds after which it is sent SIGTERM.
        most: seconds after which it is killed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            _run_and_leave(call, more_bytes)
        stopped, status, spent = False, None, 0.0
        while status is None:
            spent = max(spent, _computed(child), (time.monotonic() - began) / 30)
            found, code = os.waitpid(child, os.WNOHANG)
            if found:
                status = os.waitstatus_to_exitcode(code)
            elif spent > most:
                os.kill(child, signal.SIGKILL)
            elif spent > patience and not stopped:
                os.kill(child, signal.SIGTERM)
                stopped = True
            else:
                time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        for file in (out, error):
            file.seek(0)
        texts = [file.read().decode("utf-8", "replace") for file in (out, error)]
        return Ended(status, *texts, spent, stopped)


def _computed(process: int) -> float:
    """CPU seconds of a process and of all that it has started; 0 where the system does not say."""
    ticks, left = 0, [process]
    while left:
        place = Path(f"/proc/{left.pop()}")
        with contextlib.suppress(OSError):  # it has ended
            ticks += sum(map(int, (place / "stat").read_text().rpartition(")")[2].split()[11:15]))
            for thread in (place / "task").iterdir():
                left += map(int, (thread / "children").read_text().split())
    return ticks / os.sysconf("SC_CLK_TCK")


def _run_and_leave(call: Callable[[], int], more_bytes: int) -> None:
    os.setpgid(0, 0)
    # pytest's own streams would keep what is written.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    _bound(more_bytes)
    try:
        status = call()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _bound(more_bytes: int) -> None:
    gc.freeze()  # what was there before the fork need not be walked, and its pages copied, by each child anew
    torch.set_num_threads(1)  # threads do not survive a fork
    with open("/proc/self/statm") as file:
        begun = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (begun + more_bytes,) * 2)
