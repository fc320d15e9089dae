"""The examples of README and of the documentation run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from optima.assets import TEACHER
from optima.data.config import TransformConfig
from optima.data.pictograms import KINDS, Pictograms, describes, render
from optima.runs.directory import RunDirectory
from optima.runs.words import write_words
from optima.task import Task
from optima.tasks.pictograms import PictogramTask

ROOT = Path(__file__).parent.parent


def example(page: str, heading: str, having: str = "") -> str:
    """The first Python block under a heading of a page that has that in it."""
    section = (ROOT / page).read_text(encoding="utf-8").split(f"# {heading}\n")[1].split("\n## ")[0]
    return next(block for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if having in block)


def test_two_models_of_ones_own_are_distilled_in_under_30_lines() -> None:
    torch.manual_seed(0)
    code = example("docs/own-models.md", "Your own models")
    names: dict[str, Any] = {}
    exec(code, names)
    first, last = names["records"][0].probe, names["records"][-1].probe
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    assert last["task"] < 0.9 * first["task"]
    assert all(last[f"hidden/encoder/{layer}"] < first[f"hidden/encoder/{layer}"] for layer in (0, 1))


@pytest.mark.parametrize(
    ("page", "heading"),
    [("README.md", "The losses alone"), ("docs/own-models.md", "The losses in a loop of your own")],
)
def test_the_losses_are_called_as_shown(page: str, heading: str) -> None:
    torch.manual_seed(0)
    batch, heads, tokens, vocabulary = 2, 4, 5, 11
    names: dict[str, Any] = {
        "q_s": torch.randn(batch, heads, tokens, 8, requires_grad=True),
        "k_s": torch.randn(batch, heads, tokens, 8),
        "q_t": torch.randn(batch, heads, tokens, 16),
        "k_t": torch.randn(batch, heads, tokens, 16),
        "h_s": torch.randn(tokens, 32, requires_grad=True),
        "h_t": torch.randn(tokens, 64),
        "weight": torch.randn(64, 32),
        "bias": torch.randn(64),
        "mask": torch.tensor([True, True, False, True, True]),
        "w_s": torch.randn(vocabulary, 32),
        "w_t": torch.randn(vocabulary, 64),
    }
    exec(example(page, heading), names)
    assert all(torch.isfinite(names[loss]) and names[loss] > 0 for loss in ("maps", "states", "words"))


def test_a_student_is_used_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the shipped teacher in the student's place, which is right about nearly every image."""
    runs: tuple[tuple[Task, str], ...] = (("captioning", "distill"), ("vqa", "vqa"))
    for task, name in runs:
        directory = RunDirectory(tmp_path / "runs" / name, resume=False, keep=1)
        (directory.path / "student.safetensors").write_bytes((TEACHER).read_bytes())
        write_words(directory, PictogramTask(task, 0, torch.device("cpu")), TransformConfig())
    scene = next(s for s in map(Pictograms("test").scene, range(100)) if s.content.total == 1)
    Image.fromarray(render(scene).transpose(1, 2, 0)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(example("docs/use.md", "The student", "load_student"), {})
    caption, answer, *_ = capsys.readouterr().out.splitlines()
    assert describes(caption.strip("[]'"), scene)
    dog = next(number for number, kind in enumerate(KINDS) if kind.name == "dog")
    assert answer.split()[0] == ("yes" if scene.content.count(dog) else "no")
