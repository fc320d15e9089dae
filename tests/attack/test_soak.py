"""The soak itself: it sees what it is there to see, and says its line whenever and however it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOAK = Path(__file__).with_name("soak.py")
FILES = ["student.safetensors", "model.safetensors", "train.tar"]
UNDISTURBED = 3
"""Calls before the first disturbance of a soak of one command: two models are made first."""

PRODUCT = f"""
import os, sys, time
words = sys.argv[1:]
place = words[words.index("--out" if "--out" in words else "--run") + 1]
open(f"call-{{os.getpid()}}", "w").close()
early = sum(name.startswith("call-") for name in os.listdir()) <= {UNDISTURBED}
if not early and MODE == "hangs":
    time.sleep(1000)
if not early and MODE == "raises":
    raise KeyError
try:
    os.makedirs(place, exist_ok=True)
    for name in {FILES}:
        with open(f"{{place}}/{{name}}", "w") as file:
            file.write(("o" if not early and MODE == "differs" else "a") * 2000)
except OSError:
    print("optima: no room", file=sys.stderr)
    sys.exit(2)
"""
"""Stands for the product: writes the same files at every call, or after the undisturbed ones does something else."""


def start(folder: Path, mode: str, *options: str) -> subprocess.Popen[str]:
    product = folder / "product.py"
    product.write_text(f"MODE = {mode!r}\n{PRODUCT}")
    words = ["--job", "prepare", "--ground", str(folder / "ground"), "--command", f"{sys.executable} -S -E {product}"]
    return subprocess.Popen(
        [sys.executable, str(SOAK), *words, *options], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def calls(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("call-")) for path in (folder / "ground").glob("call-*")]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_survives_everything_has_no_fault(tmp_path: Path, seed: int) -> None:
    said, _ = start(tmp_path, "survives", "--minutes", "0.06", "--seed", str(seed)).communicate(timeout=300)
    assert re.fullmatch(r"soak: 0 min, \d+ commands; .* faults 0\n", said), said
    assert int(re.search(r"(\d+) came to equal bits", said)[1]) > 0, said


@pytest.mark.parametrize(("mode", "fault"), [("differs", "bits"), ("raises", "traceback")])
def test_what_it_is_there_to_see_is_seen(mode: str, fault: str, tmp_path: Path) -> None:
    process = start(tmp_path, mode, "--kills", "1")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert re.search(rf"^{fault}: prepare", said, re.MULTILINE), said
    assert f"faults 1 {{'{fault}': 1}}" in said.splitlines()[-1] or fault == "traceback", said


@pytest.mark.parametrize("ending", [None, signal.SIGTERM, signal.SIGINT])
def test_its_line_is_said_though_a_command_is_under_way(ending: signal.Signals | None, tmp_path: Path) -> None:
    """That command is ended, too."""
    process = start(tmp_path, "hangs", "--minutes", "30" if ending else "0.1")
    while ending and len(calls(tmp_path)) <= UNDISTURBED and process.poll() is None:
        time.sleep(0.05)
    if ending:
        process.send_signal(ending)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert re.fullmatch(r"soak: \d+ min, \d+ commands; .* faults 0\n", said), said
    assert not any(is_alive(call) for call in calls(tmp_path))


def test_a_command_that_hangs_is_a_fault(tmp_path: Path) -> None:
    said, _ = start(tmp_path, "hangs", "--kills", "1", "--longest", "1").communicate(timeout=300)
    assert re.search(r"^hung: prepare", said, re.MULTILINE), said
