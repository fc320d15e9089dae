"""The box that hostile things are read in: it names what hangs, dies, raises or wants too much memory, and goes on."""

import os
import signal
import subprocess
import sys
import time

from boxed import run_boxed, run_command


def test_whatever_a_case_does_the_others_are_run() -> None:
    def run(place: int) -> object:
        if place == 1:
            raise KeyError("lost")
        if place == 2:
            return len(bytearray(2**30))
        if place == 3:
            os._exit(7)
        if place == 4:
            time.sleep(60)
        return [place, "fine"]

    found = dict(run_boxed([f"case {place}" for place in range(6)], run, more_bytes=2**28, seconds=1.5))
    assert found["case 0"] == [0, "fine"]
    assert found["case 5"] == [5, "fine"]
    assert found["case 1"].startswith("raised")
    assert "KeyError" in found["case 1"]
    assert "MemoryError" in found["case 2"]
    assert found["case 3"].startswith("died")
    assert found["case 4"].startswith("hung")


def test_a_command_is_stopped_and_what_it_wrote_is_kept() -> None:
    def stubborn() -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("here", flush=True)
        while True:
            pass

    def polite() -> int:
        def stop(*_: object) -> None:
            raise SystemExit(130)

        signal.signal(signal.SIGTERM, stop)
        while True:
            pass

    def idle() -> int:
        time.sleep(60)
        return 0

    reading, writing = os.pipe()

    def parent() -> int:
        working = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"], pass_fds=[writing])
        signal.signal(signal.SIGTERM, lambda *_: os._exit(130))
        working.wait()
        return 0

    ended = run_command(lambda: 2, more_bytes=2**28, patience=5, most=10)
    assert (ended.status, ended.stopped) == (2, False)
    ended = run_command(stubborn, more_bytes=2**28, patience=0.5, most=1.5)
    assert (ended.status, ended.stopped, ended.out) == (-signal.SIGKILL, True, "here\n")
    ended = run_command(polite, more_bytes=2**28, patience=0.5, most=5)
    assert (ended.status, ended.stopped) == (130, True)
    assert 0.4 < ended.seconds < 5
    ended = run_command(parent, more_bytes=2**28, patience=0.5, most=5)
    assert (ended.status, ended.stopped) == (130, True)
    assert 0.4 < ended.seconds < 5
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read() == b""  # whoever could write has ended
    ended = run_command(idle, more_bytes=2**28, patience=0.02, most=0.2)
    assert (ended.status, ended.stopped) == (-signal.SIGTERM, True)
