"""The table of tasks, and what asks it."""

from typing import get_args

import pytest
import torch

from optima.coca import HeadSpec
from optima.data.record import ImageSource, Record
from optima.data.transform import mirror_allowed
from optima.report.formatting import task_title
from optima.task import LABELS, TASKS, TRUTHS, Task, title_on
from optima.tasks.data import head_spec
from optima.tasks.pictograms import HEADLINE, PictogramTask


def test_the_table_holds_every_task_once() -> None:
    assert tuple(TASKS) == get_args(Task)
    assert [task for task, spec in TASKS.items() if spec.images == 2] == ["nlvr2"]
    assert {task: spec.classes for task, spec in TASKS.items()} == {
        "captioning": (),
        "vqa": None,
        "nlvr2": TRUTHS,
        "snli_ve": LABELS,
    }


def test_only_a_benchmarks_own_data_bears_its_name() -> None:
    assert title_on("nlvr2", "nlvr2").endswith("(NLVR2)")
    assert title_on("nlvr2", "pictograms").endswith("(NLVR2-shaped)")
    assert title_on("snli_ve", "snli_ve").endswith("(SNLI-VE)")
    assert title_on("snli_ve", "pictograms").endswith("(SNLI-VE-shaped)")
    assert title_on("vqa", "vqav2") == title_on("vqa", "pictograms") == "Visual question answering"
    assert task_title("nlvr2", "nlvr2") == title_on("nlvr2", "nlvr2")
    assert task_title("mean_of_tasks") == "Mean of tasks"


@pytest.mark.parametrize("task", TASKS)
def test_a_head_takes_as_many_images_as_the_task_has(task: Task) -> None:
    data = PictogramTask(task, 3, torch.device("cpu"))
    images = data.held_batch("test", [0]).images.shape[1]
    assert images == TASKS[task].images
    assert head_spec(data) == (HeadSpec(len(data.classes), images) if task != "captioning" else None)
    assert HEADLINE[task] == ("scene_accuracy" if task == "captioning" else "accuracy")


@pytest.mark.parametrize("task", TASKS)
def test_questions_and_pairs_are_never_mirrored(task: Task) -> None:
    def allowed(text: str) -> bool:
        return mirror_allowed(task, Record("1", (ImageSource("a.jpg"),), (text,)))

    assert allowed("two dogs") == (task in ("captioning", "snli_ve"))
    assert not allowed("a dog on the left")
