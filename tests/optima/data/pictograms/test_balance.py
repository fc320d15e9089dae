"""Neither the majority answer nor the text alone gets far: guessers without an image stay near chance."""

import pytest

from optima.data.pictograms import Pictograms
from optima.data.pictograms.balance import measure
from optima.task import Task


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "snli_ve"])
def test_guessing_without_the_image_stays_near_chance(task: Task, seed: int) -> None:
    train = Pictograms("train", seed)
    test = Pictograms("test", seed, size=2500)
    fitted_on = [train.example(task, index) for index in range(6000)]
    found = measure(task, fitted_on, [test.example(task, index) for index in range(len(test))])
    print(task, found)
    assert found.majority < found.chance + 0.065, f"seed {seed}"
    assert found.template < found.chance + 0.085, f"seed {seed}"
    assert found.text < found.chance + 0.05, f"seed {seed}"


def test_questions_seen_in_training_batches_do_not_give_their_answer_away(seed: int) -> None:
    images = Pictograms("train", seed)
    batch = images.training_batch(0, 3000, questions=2, hypotheses=2, statements=2)
    truths = batch.truths.double().mean().item()
    assert abs(truths - 0.5) < 0.05, f"seed {seed}"
    yes_no = [
        int(target) for text, target in zip(batch.questions, batch.answers, strict=True) if text[:8] == "is there"
    ]
    assert abs(yes_no.count(min(yes_no)) / len(yes_no) - 0.5) < 0.06, f"seed {seed}"
    labels = batch.labels.bincount(minlength=3) / len(batch.labels)
    assert labels.max() < 0.45, f"seed {seed}"
