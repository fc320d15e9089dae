"""Exported programs: equal to the model for any batch, refused when they are not."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

from optima import load_student
from optima.assets import TEACHER
from optima.coca import CoCa
from optima.commands.serving import Served, onnx_program, torch_program
from optima.data.config import TransformConfig
from optima.data.normalise import normalise
from optima.data.pictograms import Pictograms, render
from optima.run import main
from optima.runs.directory import RunDirectory
from optima.runs.words import read_words, write_words
from optima.task import Task
from optima.tasks.pictograms import PictogramTask
from optima_core.errors import OptimaError

LENGTH = 7
USE = Path(__file__).parents[3] / "docs" / "use.md"
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("task", "image_count"), [("captioning", 1), ("nlvr2", 2)])
def test_a_torch_program_equals_the_model(task: str, image_count: int, make_coca: Callable[..., CoCa]) -> None:
    served = Served(make_coca(), task).eval()
    program = torch.export.load(io.BytesIO(torch_program(served, LENGTH))).module()
    images, tokens = torch.randn(4, image_count, 3, 64, 64), torch.randint(0, 20, (4, LENGTH))
    torch.testing.assert_close(program(images, tokens), served(images, tokens), rtol=1e-5, atol=1e-6)


def test_an_onnx_program_equals_the_model(make_coca: Callable[..., CoCa]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the packages of the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the packages of the extra onnx")
    served = Served(make_coca(), "vqa").eval()
    session = onnxruntime.InferenceSession(onnx_program(served, LENGTH), providers=["CPUExecutionProvider"])
    images, tokens = torch.randn(4, 1, 3, 64, 64), torch.randint(0, 20, (4, LENGTH))
    found = session.run(["logits"], {"images": images.numpy(), "tokens": tokens.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), served(images, tokens).detach(), rtol=1e-4, atol=1e-5)


def test_a_program_that_differs_is_refused(make_coca: Callable[..., CoCa], monkeypatch: pytest.MonkeyPatch) -> None:
    served, other = Served(make_coca(), "vqa").eval(), Served(make_coca(), "vqa").eval()
    exported = torch.export.export
    monkeypatch.setattr("torch.export.export", lambda _, *rest, **options: exported(other, *rest, **options))
    with pytest.raises(OptimaError, match=r"torch\.export program differs from the model by"):
        torch_program(served, LENGTH)


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("safetensors", {"model.safetensors", "config.json", "words.json"}),
        ("torch_export", {"model.pt2", "words.json"}),
        ("onnx", {"model.onnx", "use.py", "words.json"}),
    ],
)
def test_a_runs_student_is_exported_with_its_words(
    form: str, files: set[str], teacher_file: Path, tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="needs the packages of the extra onnx")
    directory = RunDirectory(tmp_path / "run", resume=False, keep=1)
    write_words(directory, PictogramTask("snli_ve", 0, torch.device("cpu")), TransformConfig())
    model = tmp_path / "run" / "student.safetensors"
    model.write_bytes(teacher_file.read_bytes())
    assert main(["export", "--model", str(model), "--output", str(tmp_path / "out"), "--format", form]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert read_words(tmp_path / "out").task == "snli_ve"


def test_a_program_needs_to_know_its_task(
    teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--model", str(teacher_file), "--output", str(tmp_path / "out"), "--format", "torch_export"]
    assert main(words) == 2
    assert "give --task" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "what is refused leaves no folder behind"


@pytest.mark.parametrize(("task", "fit"), [("captioning", "crop"), ("vqa", "squash")])
def test_an_onnx_program_says_all_that_its_user_must_know(
    task: Task, fit: Literal["crop", "squash"], teacher_file: Path, tmp_path: Path
) -> None:
    """The program beside it, which knows nothing of OPTIMA, says what the student says."""
    pytest.importorskip("onnxruntime", reason="needs the packages of the extra onnx")
    onnx = pytest.importorskip("onnx", reason="needs the packages of the extra onnx")
    run, out = tmp_path / "run", tmp_path / "out"
    write_words(RunDirectory(run, resume=False, keep=1), PictogramTask(task), TransformConfig(fit=fit))
    (run / "student.safetensors").write_bytes(TEACHER.read_bytes())
    options = ["export", "--model", f"{run}/student.safetensors", "--format", "onnx", "--output", str(out)]
    assert main(options) == 0
    found = onnx.load(out / "model.onnx")
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in found.graph.input] == ["batch", "batch"]
    example = next(
        e for e in map(partial(Pictograms("test").example, task), range(50)) if e.scenes[0].content.total == 1
    )
    files = []
    for side, scene in enumerate(example.scenes):
        files.append(str(tmp_path / f"{side}.png"))
        Image.fromarray(render(scene).transpose(1, 2, 0)).resize((128, 96)).save(files[-1])
    student = load_student(run, device="cpu")
    text = [] if task == "captioning" else [example.text]
    expected = student.caption(files)[0] if task == "captioning" else next(iter(student.answer(example.text, files)))
    assert said_without_optima(f"runpy.run_path({str(out / 'use.py')!r})", tmp_path, *files, *text) == expected


def said_without_optima(code: str, folder: Path, *words: str) -> str:
    """What a program prints that may import neither torch nor anything of ours."""
    hidden = ("torch", "optima", "optima_core", "optima_kernels", "safetensors", "onnx")
    begin = f"import runpy, sys\nsys.modules.update(dict.fromkeys({hidden}))\n"
    command = [sys.executable, "-I", "-c", begin + code, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_ten_lines_of_the_documentation_use_a_program(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the packages of the extra onnx")
    run = tmp_path / "runs" / "vqa"
    write_words(RunDirectory(run, resume=False, keep=1), PictogramTask("vqa"), TransformConfig())
    (run / "student.safetensors").write_bytes(TEACHER.read_bytes())
    options = ["--model", f"{run}/student.safetensors", "--format", "onnx", "--output", str(tmp_path / "exported")]
    assert main(["export", *options]) == 0
    scene = Pictograms("test").scene(3)
    Image.fromarray(render(scene).transpose(1, 2, 0)).save(tmp_path / "image.png")
    (code,) = (block for block in PYTHON.findall(USE.read_text(encoding="utf-8")) if "onnxruntime" in block)
    assert len([line for line in code.splitlines() if line]) <= 10
    expected = next(iter(load_student(run, device="cpu").answer("is there a dog?", tmp_path / "image.png")))
    assert said_without_optima(code, tmp_path) == expected


def test_a_torch_program_carries_the_same_facts(make_coca: Callable[..., CoCa]) -> None:
    files = {"optima.json": ""}
    program = io.BytesIO(torch_program(Served(make_coca(), "vqa").eval(), LENGTH))
    torch.export.load(program, extra_files=files)
    facts = json.loads(files["optima.json"])
    assert facts["value_range"] == [normalise(torch.tensor(value)).item() for value in (0, 255)]
    assert (facts["image_size"], facts["text_length"], facts["images"]) == (64, LENGTH, 1)
