"""Command lines at random, through `main`: they end with status 0, 2 or 130, in one line, and never in a traceback.

OPTIMA_FUZZ_CASES says how many are tried; 150 by default, 2,000 of a night. With -s a line says how they ended.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from boxed import Ended, run_command
from broken import encoded, scene
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniatures import make_folder
from setting_cases import BOMB
from tiny import tiny_model
from warm import import_everything

from optima.coca.checkpoint import save_coca
from optima.commands import COMMANDS
from optima.commands.parse import _option_names
from optima.run import main
from optima.tasks.pictograms import HEADS

CASES = int(os.environ.get("OPTIMA_FUZZ_CASES", "150"))
MORE_BYTES = 3 * 2**30
PATIENCE, WORKING_PATIENCE, MOST = 20.0, 2.0, 40.0
"""Seconds of work after which a command is told to stop, the same if it works, and after which it counts as hung."""

WORKING = (
    "distill",
    "distill_hf",
    "compare",
    "compare_hf",
    "pretrain",
    "finetune",
    "evaluate",
    "simulate",
    "watch",
    "demo",
    "doctor",
)
"""What trains, scores, serves or checks for as long as it is asked to; all else must end by itself.

`doctor --check` checks every kernel, which here takes Triton's interpreter minutes.
"""

BRIEF = (
    "--teacher teacher.safetensors --student student.safetensors --engine.rounds 1 --engine.steps_per_round 1 "
    "--batch_size 4 --probe_size 4 --evaluate_items 2 --test_items 4 --samples 1 --threads 1"
)
FIRST = {
    "distill": BRIEF,
    "compare": " ".join(f"--distill.{word[2:]}" if word.startswith("--") else word for word in BRIEF.split())
    + " --seeds [0] --tasks [captioning]",
    "pretrain": "--caption_steps 1 --task_steps 0 --images 2 --threads 1 --model.image_encoder.width 8 "
    "--model.text_decoder.width 8 --model.multimodal_decoder.width 8",
    "finetune": "--model student.safetensors --steps 1 --batch_size 2 --threads 1 --test_items 4",
    "evaluate": "--model teacher.safetensors --items 2 --tasks [captioning]",
    "simulate": "--rounds 5 --seeds 1",
    "import": "--checkpoint weights.pt --output out.safetensors",
    "export": "--model student.safetensors --output out",
    "prepare": "--data folder --root folder --out out --workers 1",
    "caption": "good.jpg --run .",
    "answer": "good.jpg --run . --text cat",
    "report": "--run runs",
    "plan": "--teacher teacher.safetensors --student student.safetensors --batch_size 2",
}
"""What makes a command small enough to be run to its end; options at random come after it and may undo it."""

NAMES = {name: _option_names(command.config()) for name, command in COMMANDS.items()}
WORDS = [
    "", "0", "1", "2", "-1", "3.5", "1e9", "1e400", "nan", "inf", "-inf", "99999999999999999999", "true", "false",
    "null", "cat", "captioning", "[captioning]", "vqa", "folder", "pictograms", "teacher_pca", "clip", "words",
    "[]", "{}", "[1, 2]", "{a: 1}", "[[[[", "{a: &a [1], b: *a}", "!!python/name:os.system", "a\nb", "a\tb", "\u732b",
    "[bold]x[/bold]", "m[/x]", "%s{0}", "$HOME", "~", "--", "-", "..", ".", "/", "/dev/null", "good.jpg", "folder",
    "teacher.safetensors", "student.safetensors", "cut.safetensors", "bomb.yaml", "plain.yaml", "pipe",
    "coca_base", "runs", "nowhere", "a" * 300, "d/" * 3000, "[" * 2000, "\udc80",
]  # fmt: skip


def _changed(text: str, draws: Random) -> str:
    """A word with a letter lost, doubled or another."""
    place = draws.randrange(len(text) + 1)
    return text[:place] + draws.choice(["", "x", text[place : place + 1] * 2, "."]) + text[place + 1 :]


def command_line(draws: Random) -> list[str]:
    """A command, what makes it small, and up to four options, some with a typing error."""
    name = draws.choice(list(COMMANDS))
    words = [name if draws.random() < 0.97 else _changed(name, draws)]
    if draws.random() < 0.8 or name == "plan":  # of the models that it takes by itself a step is counted for long
        words += FIRST.get(name, "").split()
    for _ in range(draws.randrange(5)):
        option = draws.choice(NAMES[name])
        option = option if draws.random() < 0.9 else _changed(option, draws)
        value = draws.choice(WORDS) if draws.random() < 0.9 else _changed(draws.choice(WORDS), draws)
        if draws.random() < 0.1:
            words.append(value)
        elif draws.random() < 0.2:
            words.append(f"--{option}")
        else:
            words += [f"--{option}={value}"] if draws.random() < 0.5 else [f"--{option}", value]
    return [word.replace("\0", "") for word in words]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything that a command line may name."""
    import_everything()
    root = tmp_path_factory.mktemp("ground")
    save_coca(tiny_model(2, HEADS), root / "teacher.safetensors")
    save_coca(tiny_model(1, {}), root / "student.safetensors")
    (root / "cut.safetensors").write_bytes((root / "teacher.safetensors").read_bytes()[:5000])
    (root / "good.jpg").write_bytes(encoded(scene()))
    (root / "bomb.yaml").write_text(BOMB)
    (root / "plain.yaml").write_text("threads: 1\n")
    (root / "weights.pt").write_bytes(b"no pickle")
    make_folder(root / "folder")
    os.mkfifo(root / "pipe")
    (root / "runs").mkdir()
    (root / "runs" / "config.yaml").write_text("[")
    return root


class Tally(list[Ended]):
    """How they ended; of a failure hypothesis shows the arguments, which this is no part of."""

    def __repr__(self) -> str:
        return "..."


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """How they ended, for a line at the end."""
    ended = Tally()
    yield ended
    by_status = Counter(found.status for found in ended)
    slow = [found.seconds for found in ended if found.seconds > 20]
    told = ", ".join(f"status {status}: {count}" for status, count in sorted(by_status.items()))
    print(f"\n{len(ended)} command lines: {told}; {sum(found.stopped for found in ended)} were told to stop, "
          f"{len(slow)} took more than 20 s")  # fmt: skip


def complaint_about(ended: Ended, name: str) -> str:
    """What is wrong with how a command ended; "" if nothing."""
    said = [line for line in ended.error.splitlines() if not line.startswith("optima: warning: ")]
    if ended.status not in (0, 2, 130):
        return f"status {ended.status}"
    if "Traceback" in ended.error + ended.out:
        return "a traceback"
    if ended.status == 2 and sum(line.startswith("optima: ") for line in said) != 1:
        return "not one line"
    if any(len(line) > 3000 for line in said):
        return "a line without end"
    if ended.stopped and name not in WORKING:
        return f"still there after {PATIENCE:g} s"
    if ended.stopped and not re.search(r"stopped", ended.error) and ended.status == 130:
        return "stopped without a word"
    return ""


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(words=st.integers(0, 2**48).map(lambda number: command_line(Random(number))))
def test_every_command_line_ends_well(
    words: list[str], ground: Path, tally: Tally, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("case")
    for path in ground.iterdir():
        (place / path.name).symlink_to(path)

    def call() -> int:
        os.chdir(place)
        os.environ["HOME"] = str(place)
        return main(words)

    patience = WORKING_PATIENCE if words[0] in WORKING else PATIENCE
    ended = run_command(call, more_bytes=MORE_BYTES, patience=patience, most=MOST)
    shutil.rmtree(place, ignore_errors=True)
    tally.append(ended)
    complaint = complaint_about(ended, words[0])
    assert not complaint, f"{complaint} after {ended.seconds:.1f} s: {words}\n{ended.error[-3000:]}"
