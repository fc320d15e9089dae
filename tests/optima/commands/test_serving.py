"""Exported programs: equal to the model for any batch, refused when they are not."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optima.coca import CoCa
from optima.commands.serving import Served, onnx_program, torch_program
from optima.data.config import TransformConfig
from optima.run import main
from optima.runs.directory import RunDirectory
from optima.runs.words import read_words, write_words
from optima.tasks.pictograms import PictogramTask
from optima_core.errors import OptimaError

LENGTH = 7


@pytest.mark.parametrize(("task", "pictures"), [("captioning", 1), ("nlvr2", 2)])
def test_a_torch_program_equals_the_model(task: str, pictures: int, make_coca: Callable[..., CoCa]) -> None:
    served = Served(make_coca(), task).eval()
    program = torch.export.load(io.BytesIO(torch_program(served, LENGTH))).module()
    images, tokens = torch.randn(4, pictures, 3, 64, 64), torch.randint(0, 20, (4, LENGTH))
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
        ("onnx", {"model.onnx", "words.json"}),
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
