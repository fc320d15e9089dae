"""Where a distillation's student starts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from optima.assets import TEACHER
from optima.coca.checkpoint import load_coca
from optima.coca.start import project_teacher, truncate_teacher
from optima.run import main
from optima.runs.config import DistillConfig, Initialisation
from optima.runs.start import make_start
from optima.tasks.forward import TaskForward
from optima.tasks.pictograms import PictogramTask
from optima_core import DistillerConfig


def test_a_student_starts_as_asked_every_time(teacher_file: Path, student_file: Path) -> None:
    data = PictogramTask("vqa", 3, torch.device("cpu"))
    teacher = load_coca(teacher_file)

    def start(init: Initialisation) -> dict[str, torch.Tensor]:
        config = DistillConfig(task="vqa", student=student_file, init=init, seed=3)
        first, second = (make_start(config, teacher, data).state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        return first

    checkpoint, scratch = load_coca(student_file), start("scratch")
    assert all(torch.equal(start("checkpoint")[name], tensor) for name, tensor in checkpoint.state_dict().items())
    assert not torch.equal(scratch["text_decoder.position"], checkpoint.text_decoder.position)

    batch = data.training_batch(0, DistillConfig().init_items)
    for init, initialise in (
        ("teacher_truncate", lambda student: truncate_teacher(student, teacher)),
        ("teacher_pca", lambda student: project_teacher(student, teacher, batch.images, batch.tokens)),
    ):
        student = make_start(DistillConfig(task="vqa", student=student_file, seed=3), teacher, data)
        initialise(student)
        found = start(init)
        assert all(torch.equal(found[name], tensor) for name, tensor in student.state_dict().items())
        assert not torch.equal(found["heads.vqa.classifier.weight"], scratch["heads.vqa.classifier.weight"])


def test_the_teacher_is_watched_in_the_arithmetic_of_the_run(seed: int) -> None:
    data = PictogramTask("captioning", seed, torch.device("cpu"))
    teacher = load_coca(TEACHER)
    seen: list[torch.dtype] = []
    teacher.image_encoder.blocks[0].mlp[2].register_forward_hook(lambda _, __, found: seen.append(found.dtype))
    whole, half = (
        make_start(DistillConfig(seed=seed, engine=DistillerConfig(precision=precision)), teacher, data)
        for precision in ("fp32", "bf16")
    )
    assert seen == [torch.float32, torch.bfloat16]
    batch = data.training_batch(0, 64)
    with torch.no_grad():
        losses = [float(TaskForward(model, "captioning")(batch, {}).task_loss) for model in (whole, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_start_follows_from_what_the_student_is(student_file: Path) -> None:
    data = PictogramTask("captioning", 3, torch.device("cpu"))
    teacher = load_coca(TEACHER)

    def start(**given: Any) -> dict[str, torch.Tensor]:
        return make_start(DistillConfig(seed=3, **given), teacher, data).state_dict()

    checkpoint = load_coca(student_file).state_dict()
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in start(student=student_file).items())
    shipped = start(init="teacher_pca")
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in start().items())


@pytest.mark.parametrize("init", ["teacher_truncate", "teacher_pca"])
def test_distillation_from_the_teachers_layers_resumes(brief: list[str], tmp_path: Path, init: str) -> None:
    words = [*brief, "--run", str(tmp_path / "run"), "--init", init]
    assert main(words) == 0
    assert main([*words, "--resume"]) == 0
