"""A position in the data is an integer: the same in every process, whatever was asked before."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from optima.data.pictograms import ANSWERS, SPLITS, Pictograms, describes, nlvr2, render, snli_ve, vqa
from optima.task import LABELS, TASKS, TRUTHS

FINGERPRINT = """
import hashlib, sys
from optima.data.pictograms import SPLITS, Pictograms
from optima.task import TASKS
digest = hashlib.sha256()
for split in SPLITS:
    images = Pictograms(split, int(sys.argv[1]))
    for task in TASKS:
        batch = images.batch(task, 5, 20)
        digest.update(batch.images.numpy().tobytes() + repr((batch.texts, batch.targets.tolist())).encode())
    training = images.training_batch(6, 10)
    digest.update(training.images.numpy().tobytes() + repr(training[1:-1]).encode())
print(digest.hexdigest())
"""


def test_two_processes_make_the_same_data(seed: int) -> None:
    def fingerprint(hash_seed: str) -> str:
        command = [sys.executable, "-c", FINGERPRINT, str(seed)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert fingerprint("1") == fingerprint("2")


def test_the_texts_and_classes_that_shipped_models_know_have_not_changed() -> None:
    digest = hashlib.sha256()
    for split in SPLITS:
        images = Pictograms(split, 3)
        for task in TASKS:
            examples = [images.example(task, index) for index in range(50)]
            digest.update(repr([(e.text, e.target, e.answer, e.kind) for e in examples]).encode())
    assert digest.hexdigest() == "3069fd13b05b4b93c42f4723c2f52c786ded8b6e8575485753aa6e15a38a3411"


def test_an_item_does_not_depend_on_its_batch(seed: int) -> None:
    images = Pictograms("test", seed)
    for task in TASKS:
        whole, part = images.batch(task, 10, 8), images.batch(task, 13, 2)
        assert torch.equal(whole.images[3:5], part.images)
        assert whole.texts[3:5] == part.texts
        assert torch.equal(whole.targets[3:5], part.targets)
        assert whole.examples[3:5] == part.examples == tuple(images.example(task, index) for index in (13, 14))


def test_a_batch_has_the_documented_shapes(seed: int) -> None:
    images = Pictograms("validation", seed)
    for task in TASKS:
        batch = images.batch(task, 0, 5)
        assert batch.images.shape == (5, 2 if task == "nlvr2" else 1, 3, 64, 64)
        assert batch.images.dtype == torch.uint8
        assert batch.targets.shape == (5,)
        assert batch.targets.dtype == torch.int64
        for number, example in enumerate(batch.examples):
            for place, scene in enumerate(example.scenes):
                assert torch.equal(batch.images[number, place], torch.from_numpy(render(scene)))


def test_seeds_and_splits_and_tasks_give_different_images(seed: int) -> None:
    sets = [Pictograms("train", seed), Pictograms("train", seed + 1), Pictograms("test", seed)]
    images = [bytes(pictograms.pixels(index)) for pictograms in sets for index in range(5)]
    images += [bytes(sets[0].batch(task, 0, 1).images.numpy()[0, 0]) for task in TASKS]
    assert len(set(images)) == len(images)


def test_held_out_splits_end_and_training_does_not() -> None:
    assert len(Pictograms("validation")) == 2000
    assert len(Pictograms("test", size=7)) == 7
    with pytest.raises(IndexError, match="0 to 6 in the test split, got 7"):
        Pictograms("test", size=7).scene(7)
    with pytest.raises(IndexError, match="0 or more"):
        Pictograms("train").scene(-1)
    with pytest.raises(TypeError, match="endless"):
        len(Pictograms("train"))
    Pictograms("train").scene(2**62)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="split: one of train, validation, test, got 'dev'"):
        Pictograms("dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed"):
        Pictograms("train", -1)
    with pytest.raises(ValueError, match="size"):
        Pictograms("train", size=10)
    with pytest.raises(ValueError, match="task: one of captioning, vqa, nlvr2, snli_ve, got 'ocr'"):
        Pictograms("train").example("ocr", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="even"):
        Pictograms("train").training_batch(1, 2)


def test_the_texts_of_a_training_batch_are_true_of_their_own_images(seed: int) -> None:
    batch = Pictograms("train", seed).training_batch(0, 16, questions=5, hypotheses=4, statements=6)
    for number, scene in enumerate(batch.scenes):
        assert torch.equal(batch.images[number], torch.from_numpy(render(scene)))
        assert describes(batch.captions[number], scene)
        answers = {question.text: question.answer for question in vqa(scene)}
        for item in range(5 * number, 5 * number + 5):
            assert answers[batch.questions[item]] == ANSWERS[batch.answers[item]], f"seed {seed}"
        labels = {hypothesis.text: hypothesis.answer for hypothesis in snli_ve(scene)}
        for item in range(4 * number, 4 * number + 4):
            assert labels[batch.hypotheses[item]] == LABELS[batch.labels[item]], f"seed {seed}"
    for pair in range(8):
        truths = {statement.text: statement.answer for statement in nlvr2(*batch.scenes[2 * pair : 2 * pair + 2])}
        for item in range(6 * pair, 6 * pair + 6):
            assert truths[batch.statements[item]] == TRUTHS[batch.truths[item]], f"seed {seed}"


def test_a_training_batch_keeps_texts_with_their_images(seed: int) -> None:
    images = Pictograms("train", seed)
    whole = images.training_batch(0, 6, questions=3, hypotheses=1, statements=2)
    part = images.training_batch(2, 2, questions=3, hypotheses=1, statements=2)
    assert torch.equal(whole.images[2:4], part.images)
    assert whole.captions[2:4] == part.captions
    assert whole.questions[6:12] == part.questions
    assert torch.equal(whole.answers[6:12], part.answers)
    assert whole.hypotheses[2:4] == part.hypotheses
    assert whole.statements[2:4] == part.statements
    assert torch.equal(whole.truths[2:4], part.truths)
