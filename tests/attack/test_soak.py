"""The soak itself: it sees what it is there to see, and says its line whenever and however it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak
from jobs import jobs

FILES = ["model.safetensors", "train.tar"]
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


def product(folder: Path, mode: str) -> list[str]:
    path = folder / "product.py"
    path.write_text(f"MODE = {mode!r}\n{PRODUCT}")
    return [sys.executable, "-S", "-E", str(path)]


@pytest.fixture
def make(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch):
    """A soak of `prepare`, by what stands for it, after the undisturbed runs."""
    monkeypatch.setattr(soak, "write_images", lambda root: None)

    def made(mode: str) -> soak.Soak:
        chosen = [job for job in jobs() if job.name == "prepare"]
        found = soak.Soak(tmp_path, product(tmp_path, mode), chosen, seed, longest=1)
        found.prepare_ground()
        return found

    return made


def test_what_survives_everything_has_no_fault(make) -> None:
    found = make("survives")
    (job,) = found.jobs
    for disturb in (lambda job: found.disturb_by_kills(job, 3), found.disturb_by_full_disk, found.disturb_by_damage):
        for _ in range(3):
            disturb(job)
    assert found.tally.faults == []
    assert found.tally.finished + found.tally.refused >= 6
    assert found.figures().endswith("faults 0")


@pytest.mark.parametrize(("mode", "fault"), [("differs", "bits"), ("raises", "traceback"), ("hangs", "hung")])
def test_what_it_is_there_to_see_is_seen(mode: str, fault: str, make, capsys: pytest.CaptureFixture[str]) -> None:
    found = make(mode)
    found.end_well(found.jobs[0], found.new_place(found.jobs[0]), "prepare")
    assert found.tally.faults[0].startswith(f"{fault}: prepare")
    assert f"'{fault}': 1" in found.figures()
    assert capsys.readouterr().out.splitlines() == found.tally.faults


@pytest.mark.parametrize("ending", [None, signal.SIGTERM])
def test_its_line_is_said_though_a_command_is_under_way(ending: signal.Signals | None, tmp_path: Path) -> None:
    """That command is ended, too."""
    ground = tmp_path / "ground"
    words = ["--job", "prepare", "--ground", str(ground), "--minutes", "30" if ending else "0.05"]
    words += ["--command", " ".join(product(tmp_path, "hangs"))]
    process = subprocess.Popen([sys.executable, soak.__file__, *words], stdout=subprocess.PIPE, text=True)
    while ending and len(list(ground.glob("call-*"))) <= UNDISTURBED and process.poll() is None:
        time.sleep(0.05)
    if ending:
        process.send_signal(ending)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert re.fullmatch(r"soak: \d+ min, \d+ commands; .* faults 0\n", said), said
    for path in ground.glob("call-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.removeprefix("call-")), 0)
