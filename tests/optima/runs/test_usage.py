"""What a process uses, against one that is known to be busy, and against a machine that is made up."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optima.runs import usage
from optima.runs.usage import Usage

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="use is read from Linux's /proc")


def test_cores_are_what_the_process_spent_since_the_last_look(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        (tmp_path / ".lock").write_text(f"{process.pid}\n")
        used = Usage(tmp_path / ".lock")
        used()
        before, begun = cpu_seconds(process.pid), time.monotonic()
        time.sleep(1)
        told, seconds = used()["processor"], time.monotonic() - begun
        cores = (cpu_seconds(process.pid) - before) / seconds
        assert float(told.split()[0]) == pytest.approx(cores, abs=0.15)
        assert f"of {os.cpu_count()} cores" in told
    finally:
        process.kill()
        process.wait()
    assert "processor" not in used()


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def test_a_directory_that_no_process_holds_tells_nothing(tmp_path: Path) -> None:
    assert "processor" not in Usage(tmp_path / ".lock")()
    (tmp_path / ".lock").write_text("no number")
    assert "processor" not in Usage(tmp_path / ".lock")()


def test_gpus_are_told_as_nvidia_smi_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho '0, 97, 40123, 81559'\necho '1, 0, 3, 81559'\n")
    command.chmod(0o755)
    monkeypatch.setattr(usage.shutil, "which", lambda name: str(command))
    told = Usage(tmp_path / ".lock")()
    assert told == {"GPU 0": "97 %, 40123 of 81559 MiB", "GPU 1": "0 %, 3 of 81559 MiB"}
    command.write_text("#!/bin/sh\nexit 9\n")
    assert Usage(tmp_path / ".lock")() == {}
