"""The door: what becomes of mistakes, of faults of ours and of Ctrl-C, and what starting costs."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image

import optima
from optima.commands import COMMANDS
from optima.run import main
from optima_core import OptimaError


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"optima {version('optima-distill')}\n"
    assert optima.__version__ == version("optima-distill")


@pytest.mark.parametrize("words", [["help"], ["help", "doctor"], ["doctor", "help"], ["-h"]])
def test_help_is_asked_for_in_any_way(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: optima")


@pytest.mark.parametrize("error", [OptimaError("the teacher is tired"), ValueError("zip() argument 2 is longer")])
def test_a_mistake_is_a_line_and_a_fault_of_ours_is_not(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr("optima.commands.doctor.doctor", fails)
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="longer"):
            main(["doctor"])
        return
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "optima: the teacher is tired\n"
    for words, variable in ((["doctor", "-v"], ""), (["doctor"], "1")):
        monkeypatch.setenv("OPTIMA_TRACEBACK", variable)
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback")
        assert lines[-1] == "optima: the teacher is tired"


@pytest.mark.parametrize(
    ("take", "said"),
    [
        (lambda: bytearray(2**62), ""),
        (lambda: torch.empty(2**50), "memory: you tried to allocate"),
        (lambda: torch.empty(2**40, 2**40), "Storage size calculation overflowed"),
        (lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried\nto")), r"CUDA out of memory. Tried\)"),
    ],
)
def test_too_little_memory_is_a_line(
    take: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optima.commands.doctor.doctor", lambda _: take())
    assert main(["doctor"]) == 2
    assert re.fullmatch(rf"optima: memory is not enough.*{said}.*; `optima plan` says .*\n", capsys.readouterr().err)


def raised(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        *(f"{name} --help" for name in COMMANDS),
        "distil",
        "--bach_size 3",
        "--engine.bandit.policy discounted_tompson",
        "--config coca_large_to_tiny12_vqaa",
        "plan --utilisation 2",
        "report nowhere",
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(words: str) -> None:
    code = (
        "import resource, sys\n"
        "from optima.run import main\n"
        f"try: main({words.split()})\n"
        "except SystemExit: pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print()\n"
        "print(used.ru_utime + used.ru_stime, *({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    found = run_python(code)
    seconds, *heavy = found.stdout.splitlines()[-1].split()
    assert heavy == []
    assert float(seconds) < 0.7, "of CPU; 0.2 on a machine where `import torch` takes 1.1"


INTERRUPTED = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{signal})

sys.meta_path.insert(0, Interrupts())
from optima.run import main
sys.exit(main(["doctor"]))
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", ["jsonargparse", "torch"])
def test_interrupted_while_it_starts_it_ends_at_once_and_in_a_line(module: str, number: str) -> None:
    found = run_python(INTERRUPTED.format(module=module, signal=number))
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "optima: stopped\n")


def test_brackets_in_a_path_are_no_markup(
    brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = tmp_path / "run[/red]"
    assert main([*brief, "--engine.rounds", "1", "--run", str(run), "--report", "false"]) == 0
    assert f"Run: {run}" in capsys.readouterr().out
    root = tmp_path / "m[/x]"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "images" / "a.png")
    (root / "captions.tsv").write_text("a.png\ta dog\nb[/red].png\ta dog\n")
    words = ["prepare", "--data", "folder", "--root", str(root), "--out", str(tmp_path / "out[bold]")]
    assert main([*words, "--max_rejected", "1"]) == 0
    said = "".join(capsys.readouterr().out.split())  # a long title is broken into lines
    assert f"folderin{root}" in said
    assert str(tmp_path / "out[bold]") in said
    model = brief[brief.index("--teacher") + 1]
    words = ["evaluate", "--model", model, "--tasks", "vqa", "--items", "2", "--predictions", str(tmp_path / "p[/b]")]
    assert main(words) == 0
    assert str(tmp_path / "p[/b]") in capsys.readouterr().out


def test_what_is_made_lazily_is_there_and_nothing_else() -> None:
    assert optima.DistillConfig().task == "captioning"
    assert callable(optima.distill)
    assert callable(optima.load_student)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = optima.distil  # type: ignore[attr-defined]


def test_a_word_without_end_is_shown_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", f"--environments={'d/' * 5000}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("optima: environments: unknown 'd/d/")
    assert "known: abrupt" in line
    assert len(line) < 1500
