"""Asked to stop by Ctrl-C or SIGTERM, a run ends what it is at and saves it; asked again, it leaves at once."""

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from types import FrameType

from optima_core.processes import several

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO = 3.0
"""Seconds in which torchrun passes on to every process the Ctrl-C that the terminal has sent to all of them, too."""


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """While entered, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    if not _handles_signals():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is noted in `made`; the next one raises KeyboardInterrupt.

    Under torchrun, what follows at once is the same request again.
    """

    def __init__(self) -> None:
        self.made = False
        self._over = 0.0
        self._echo = _ECHO if several() else 0.0

    def __enter__(self) -> "StopRequest":
        handled = _SIGNALS if _handles_signals() else ()
        self._previous = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.made and time.monotonic() >= self._over:
            raise KeyboardInterrupt
        self._over = time.monotonic() + self._echo
        self.made = True


def _handles_signals() -> bool:
    """Python lets only the main thread handle signals; in another one the caller's handling stays."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Shows a warning without the line of code that gave it."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"optima: warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
