"""What a CoCa shows the objective when it does a task."""

import pytest
import torch
from torch.nn import functional as F

from optima.coca.pairs import module_pairs
from optima.data.pictograms.stream import CLASSES
from optima.data.tokenizer import word_tokenizer
from optima.task import TASKS, Task
from optima.tasks.forward import TaskForward
from optima.tasks.pictograms import PictogramTask
from optima_core import LinearPrediction, LogitPrediction, Objective, ObjectiveConfig


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_holds_images_in_range_and_fixed_length_texts(task: Task) -> None:
    tokenizer = word_tokenizer()
    batch = PictogramTask(task).held_batch("validation", range(3, 8))
    assert batch.images.shape == (5, 2 if task == "nlvr2" else 1, 3, 64, 64)
    assert -1 <= batch.images.min() < 0 < batch.images.max() <= 1
    assert batch.tokens.shape == (5, 14)
    assert (batch.tokens[:, 0] == tokenizer.start_id).all()
    again = PictogramTask(task).held_batch("validation", [4])
    assert torch.equal(again.images[0], batch.images[1])


@pytest.mark.parametrize("task", [task for task in TASKS if CLASSES[task]])
def test_classification_shows_the_cross_entropy_and_all_class_logits(make_coca, task: Task, seed: int) -> None:
    model = make_coca()
    batch = PictogramTask(task).held_batch("validation", range(6))
    shown = TaskForward(model, task)(batch, {"text_decoder": (0,)})
    assert isinstance(shown.prediction, LogitPrediction)
    logits = shown.prediction.logits
    assert logits.shape == (6, len(CLASSES[task]))
    torch.testing.assert_close(shown.task_loss, F.cross_entropy(logits, batch.targets))
    assert list(shown.taps) == ["text_decoder"]


def test_captioning_shows_the_captioning_loss_and_counts_no_padding(make_coca, seed: int) -> None:
    model = make_coca()
    batch = PictogramTask("captioning").held_batch("validation", range(6))
    shown = TaskForward(model, "captioning")(batch, {})
    prediction = shown.prediction
    assert isinstance(prediction, LinearPrediction)
    assert prediction.mask is not None
    logits = prediction.hidden @ prediction.weight.T
    following = batch.tokens[:, 1:].flatten()
    assert torch.equal(prediction.mask, following != 0)
    expected = F.cross_entropy(logits[prediction.mask], following[prediction.mask])
    torch.testing.assert_close(shown.task_loss, expected)


@pytest.mark.parametrize("task", TASKS)
def test_every_module_can_be_distilled_on_every_task(make_coca, task: Task, seed: int) -> None:
    student, teacher = make_coca(16, 1), make_coca(32, 2)
    objective = Objective(module_pairs(student, teacher, single_layer_maps=True), ObjectiveConfig())
    names = list(objective.pairs)
    assert names == ["image_encoder", "text_decoder", "multimodal_decoder"]
    wanted_student, wanted_teacher = objective.wanted(names)
    batch = PictogramTask(task).held_batch("validation", range(4))
    with torch.no_grad():
        taught = TaskForward(teacher, task)(batch, wanted_teacher)
    terms = objective(TaskForward(student, task)(batch, wanted_student), taught, dict.fromkeys(names, torch.ones(())))
    assert len(terms) == 8
    assert all(torch.isfinite(term) and term > 0 for term in terms.values())
    objective.total(terms).backward()
    unused = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    heads = {name for name in unused if name.startswith("heads.")}
    assert not any(name.startswith(f"heads.{task}.") for name in heads)
    # The contrastive side is not part of a task.
    assert {name.split(".")[0] for name in unused - heads} <= {
        "image_encoder", "text_decoder", "logit_scale", "multimodal_decoder"
    }  # fmt: skip
    assert not any(".blocks." in name or ".layers." in name for name in unused)


def test_maps_of_an_only_layer_are_not_those_of_a_deep_module(make_coca) -> None:
    def maps(student: int, teacher: int) -> set[bool]:
        return {pair.maps for pair in module_pairs(make_coca(16, student), make_coca(32, teacher))}

    assert (maps(1, 2), maps(1, 1), maps(2, 2), maps(2, 3)) == ({False}, {True}, {True}, {True})


def test_models_that_cut_images_differently_are_refused(make_coca) -> None:
    with pytest.raises(ValueError, match="the student has 4 x 4 patches and 5 pooler queries, the teacher 4 x 4 and 0"):
        module_pairs(make_coca(pooler_queries=5), make_coca())
    with pytest.raises(ValueError, match="the student has 2 x 2 patches"):
        module_pairs(make_coca(image_size=32), make_coca())


def test_a_student_deeper_than_its_teacher_is_refused(make_coca) -> None:
    with pytest.raises(ValueError, match="module image_encoder: 3 student layers"):
        module_pairs(make_coca(16, 3), make_coca(16, 2))
