"""The door: `optima [COMMAND] [OPTIONS]`, or `python -m optima.run`.

Mistakes end in one line on standard error and exit status 2. Of anything else that goes wrong the traceback is shown,
since it is ours to mend; `-v` or OPTIMA_TRACEBACK=1 shows it of mistakes, too.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from optima.untrusted import shown
from optima_core.errors import OptimaError
from optima_core.processes import leave, several, speaks


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 2 after a mistake, 130 when stopped by Ctrl-C or SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "-v" in words or os.environ.get("OPTIMA_TRACEBACK", "0") not in ("", "0")
    resumes = False
    try:
        with _Imports():
            from optima.commands.parse import parse

            command, config = parse([word for word in words if word != "-v"])
            work, resumes = command.function(), command.resumes
            from optima.runs.interruption import terminate_as_interrupt, warnings_in_a_line
        with terminate_as_interrupt(), warnings_in_a_line():
            work(config)
    except KeyboardInterrupt:
        _complain("stopped; continue with the same command and --resume" if resumes else "stopped")
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        mistake = _told(error)
        if mistake is None:
            raise
        if traceback:
            sys.excepthook(type(error), error, error.__traceback__)
        _complain(mistake)
        return 2
    return 0


class _Imports:
    """While entered, Ctrl-C or SIGTERM ends the process at once: a command is being imported, and nothing is begun."""

    def __enter__(self) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM)
        handled = numbers if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._leave) for number in handled}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"optima: stopped\n")
        os._exit(130)


def _told(error: Exception) -> str | None:
    """A mistake, or what the system refuses, in a line; None if the error is a fault of ours."""
    if isinstance(error, OptimaError):
        return str(error)
    if isinstance(error, OSError):
        return f"{shown(error.filename or 'a file')} cannot be read or written: {error.strerror or error}"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(f"{type(error).__name__}: {error}"):
        said = str(error).strip().partition("\n")[0]
        return f"memory is not enough{f' ({said:.300})' if said else ''}; `optima plan` says what a run needs"
    return None


_NO_MEMORY = re.compile(
    r"^OutOfMemoryError|^RuntimeError: .*((can't allocate|not enough) memory|Storage size calculation overflowed)"
)
"""Of what torch raises, which has a class of its own for a GPU's memory alone, and need not be loaded here."""


def _complain(message: str) -> None:
    if several():
        # A process that ends makes torchrun end the others, which may have something to tell.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not speaks():
            return
    print(f"optima: {' '.join(shown(word, 1000) for word in message.split())}", file=sys.stderr)


def door() -> NoReturn:
    """Runs the command of this process's words, and ends it."""
    if not several():
        sys.exit(main())
    try:
        status = main()
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    leave(status)


if __name__ == "__main__":
    door()
