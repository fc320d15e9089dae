"""Scores, of models whose answers are known beforehand."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch

from optima.data.pictograms.stream import CLASSES, Pictograms
from optima.data.tokenizer import word_tokenizer
from optima.task import TASKS, Task
from optima.tasks.evaluate import evaluate
from optima.tasks.pictograms import HEADLINE, TEXT_LENGTH, PictogramTask
from optima_core.parallel import Ranks


@pytest.mark.parametrize("task", [task for task in TASKS if CLASSES[task]])
def test_a_model_that_always_says_one_class_scores_that_class_share(make_coca, task: Task) -> None:
    model, data = make_coca(), Pictograms("test")
    always = 1
    head = model.heads[task].classifier
    last = head if isinstance(head, torch.nn.Linear) else head[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        last.bias[always] = 1.0
    found = evaluate(model, PictogramTask(task), "test", limit=30, batch_size=7)
    examples = [data.example(task, index) for index in range(30)]
    right = [example.target == always for example in examples]
    assert found.correct == right
    assert found.predictions == [CLASSES[task][always]] * 30
    assert found.scores["accuracy"] == pytest.approx(100 * sum(right) / 30)
    for kind in {example.kind for example in examples}:
        of_kind = [good for good, example in zip(right, examples, strict=True) if example.kind == kind]
        assert found.scores[f"accuracy/{kind}"] == pytest.approx(100 * sum(of_kind) / len(of_kind))
    assert HEADLINE[task] in found.scores


def captions_said(model, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """Makes generation say these captions, one an item."""
    rows = iter(said)

    def fake(model, images, **_):
        return word_tokenizer().encode([next(rows) for _ in images], TEXT_LENGTH)

    monkeypatch.setattr("optima.tasks.evaluate.generate", fake)


def test_the_reference_captions_score_everything(make_coca, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Pictograms("test")
    captions_said(make_coca(), monkeypatch, [data.example("captioning", i).text for i in range(20)])
    found = evaluate(make_coca(), PictogramTask("captioning"), "test", limit=20, batch_size=6)
    assert found.scores == {"scene_accuracy": 100.0, "kind_accuracy": 100.0, "count_accuracy": 100.0}
    assert found.correct == [True] * 20


def test_captions_of_other_images_and_nonsense_score_little(make_coca, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Pictograms("test")
    said = ["a a a" if i % 2 else data.example("captioning", 500 + i).text for i in range(20)]
    captions_said(make_coca(), monkeypatch, said)
    found = evaluate(make_coca(), PictogramTask("captioning"), "test", limit=20)
    assert found.scores["scene_accuracy"] <= found.scores["count_accuracy"] <= found.scores["kind_accuracy"] <= 20
    assert found.predictions == said


def test_evaluation_leaves_the_mode_as_it_was(make_coca) -> None:
    model = make_coca().train()
    evaluate(model, PictogramTask("vqa"), "validation", limit=4)
    assert model.training
    evaluate(model.eval(), PictogramTask("vqa"), "validation", limit=4)
    assert not model.training


def test_the_batch_size_changes_no_prediction(make_coca, seed: int) -> None:
    model, data = make_coca(), PictogramTask("captioning")
    small, large = (evaluate(model, data, "validation", limit=9, batch_size=b) for b in (2, 9))
    assert small.predictions == large.predictions


class Threads(Ranks):
    """Ranks that are threads of this process; `meeting` holds what they bring to `gather`."""

    meeting: ClassVar[dict[int, Any]] = {}
    barrier: ClassVar[threading.Barrier]

    def gather(self, value: Any) -> list[Any]:
        self.meeting[self.rank] = value
        self.barrier.wait(60)
        return [self.meeting[rank] for rank in range(self.count)]


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("task", TASKS)
def test_ranks_together_find_exactly_what_one_process_finds(make_coca, count: int, task: Task, seed: int) -> None:
    """Six of them share four batches."""
    model, data = make_coca(), PictogramTask(task)
    alone = evaluate(model, data, "validation", limit=22, batch_size=6)
    Threads.barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as threads:
        found = threads.map(
            lambda rank: evaluate(
                copy.deepcopy(model), data, "validation", limit=22, batch_size=6, ranks=Threads(rank, count)
            ),
            range(count),
        )
        assert list(found) == [alone] * count
