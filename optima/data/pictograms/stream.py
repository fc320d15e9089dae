"""The data set: scenes, items for the four tasks, and batches, all addressed by integers.

Nothing is stored. A scene or an item is a pure function of (seed, split, task, index), so a position in the data is one
integer, two processes that ask for the same index get the same bytes, and resuming a run needs no state of a loader.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optima.data.draws import Draws
from optima.data.pictograms.captions import caption
from optima.data.pictograms.combinations import SPLITS, Split, arrange, stock
from optima.data.pictograms.hypotheses import draw_hypothesis, propose
from optima.data.pictograms.questions import ANSWER_OF, ANSWERS, ask, draw_question
from optima.data.pictograms.render import render
from optima.data.pictograms.scene import Scene, compose
from optima.data.pictograms.statements import draw_statement, related, state
from optima.task import LABELS, TASKS, TRUTHS, Task

CLASSES: dict[Task, tuple[str, ...]] = {"captioning": (), "vqa": ANSWERS, "nlvr2": TRUTHS, "snli_ve": LABELS}
"""The names of each task's classes, by class index. Captioning has none."""
HELD_OUT_SIZE = 2000
"""Items in the validation and in the test split, by default."""

_PURPOSES = ("scene", *TASKS, "training")


@dataclass(frozen=True, slots=True)
class Example:
    """One item of a task.

    `scenes` holds one scene, or the left and the right one for nlvr2. `text` is the caption, question, statement or
    hypothesis. `answer` is the answer in words and `target` its class in CLASSES[task]; for captioning they are the
    caption again and -1. `kind` is the item's type or template.
    """

    task: Task
    scenes: tuple[Scene, ...]
    text: str
    target: int
    answer: str
    kind: str


class Batch(NamedTuple):
    """Consecutive items of one task."""

    images: Tensor  # uint8 [items, images, 3, 64, 64], two images for nlvr2, else one
    texts: list[str]
    targets: Tensor  # int64 [items]
    examples: tuple[Example, ...]


class SceneItems(NamedTuple):
    """Texts about one scene, for training."""

    caption: str
    questions: list[tuple[str, int]]  # text, class in ANSWERS
    hypotheses: list[tuple[str, int]]  # text, class in LABELS


class TrainingBatch(NamedTuple):
    """Images with several texts each, so that encoding an image is paid for once.

    Texts about one image are consecutive: text i of `questions` is about image i // (questions per image). Pair
    p of `statements` is (image 2 p, image 2 p + 1), and statement i is about pair i // (statements per pair).
    """

    images: Tensor  # uint8 [images, 3, 64, 64]
    captions: list[str]
    questions: list[str]
    answers: Tensor  # int64, class in ANSWERS
    hypotheses: list[str]
    labels: Tensor  # int64, class in LABELS
    statements: list[str]
    truths: Tensor  # int64, class in TRUTHS
    scenes: tuple[Scene, ...]


class Pictograms:
    """Images of emoji with ground truth for captioning, VQA, NLVR2-shaped and SNLI-VE-shaped tasks.

    Args:
        split: "train" is endless; "validation" and "test" show combinations of kinds and counts that train never does.
        seed: 0 or more; other seeds give other scenes and items from the same combinations.
        size: number of items of a held-out split (default 2000); train takes none.
    """

    def __init__(self, split: Split, seed: int = 0, size: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: one of {', '.join(SPLITS)}, got {split!r}")
        if not 0 <= seed < 2**56:
            raise ValueError(f"seed: an integer from 0 to 2**56 - 1, got {seed!r}")
        if size is not None and (split == "train" or size < 1):
            raise ValueError(f"size: at least 1, and only for a held-out split, got {size!r} for {split}")
        self.split: Split = split
        self.seed = seed
        self._size = None if split == "train" else size or HELD_OUT_SIZE
        self._stock = stock(split)

    def __len__(self) -> int:
        """Items of each task, and scenes, in a held-out split. Raises TypeError for train, which is endless."""
        if self._size is None:
            raise TypeError("the train split is endless and has no length")
        return self._size

    def scene(self, index: int) -> Scene:
        """Scene number `index`, drawn without a task in mind."""
        draws = self._draws("scene", index)
        return compose(arrange(self._stock.any(draws), draws), draws)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """The image of `scene(index)`, uint8 [3, 64, 64]."""
        return render(self.scene(index))

    def example(self, task: Task, index: int) -> Example:
        """Item number `index` of the task.

        Drawn item first: the type, then the answer (or for statements and hypotheses the text, then the answer), and
        only then a scene of the split that has this answer. So neither the most frequent answer nor the text gives it
        away.
        """
        draws = self._draws(task, index)
        if task == "captioning":
            content = arrange(self._stock.any(draws), draws)
            text = caption(content, draws)
            kind = "one_group" if content.axis is None else "two_groups"
            return Example(task, (compose(content, draws),), text, -1, text, kind)
        if task == "vqa":
            question, content = draw_question(self._stock, draws)
            scene = compose(content, draws)
            return Example(task, (scene,), question.text, ANSWER_OF[question.answer], question.answer, question.kind)
        if task == "snli_ve":
            hypothesis, content = draw_hypothesis(self._stock, draws)
            label = hypothesis.label(content)
            scene = compose(content, draws)
            return Example(task, (scene,), hypothesis.text, label, LABELS[label], hypothesis.template)
        statement, left, right = draw_statement(self._stock, draws)
        truth = int(statement.truth(left, right))
        scenes = (compose(left, draws), compose(right, draws))
        return Example(task, scenes, statement.text, truth, TRUTHS[truth], statement.template)

    def batch(self, task: Task, start: int, size: int) -> Batch:
        """Items start, ..., start + size - 1 of the task, with their images drawn."""
        return collate([self.example(task, index) for index in range(start, start + size)])

    def training_batch(
        self, start: int, images: int, questions: int = 2, hypotheses: int = 2, statements: int = 2
    ) -> TrainingBatch:
        """Images start, ..., start + images - 1 of the training stream, each with several texts.

        Args:
            start: an even number, the first image.
            images: an even number; images 2 p and 2 p + 1 are a pair, and half of the pairs share a kind.
            questions: VQA items per image.
            hypotheses: SNLI-VE items per image.
            statements: NLVR2 items per pair.
        """
        if start % 2 or images % 2:
            raise ValueError(f"start, images: even numbers, because images come in pairs, got {start}, {images}")
        pixels = np.empty((images, 3, 64, 64), dtype=np.uint8)
        captions: list[str] = []
        asked: list[tuple[str, int]] = []
        proposed: list[tuple[str, int]] = []
        stated: list[tuple[str, int]] = []
        shown: list[Scene] = []
        for place in range(0, images, 2):
            draws = self._draws("training", start + place)
            left = arrange(self._stock.any(draws), draws)
            right = related(self._stock, left, draws)
            scenes = (compose(left, draws), compose(right, draws))
            for offset, scene in enumerate(scenes):
                pixels[place + offset] = render(scene)
                items = training_scene_items(scene, draws, questions, hypotheses)
                captions.append(items.caption)
                asked += items.questions
                proposed += items.hypotheses
            stated += training_pair_items(scenes, draws, statements)
            shown += scenes
        return TrainingBatch(
            torch.from_numpy(pixels),
            captions,
            *_columns(asked),
            *_columns(proposed),
            *_columns(stated),
            tuple(shown),
        )

    def _draws(self, purpose: str, index: int) -> Draws:
        if purpose not in _PURPOSES:
            raise ValueError(f"task: one of {', '.join(TASKS)}, got {purpose!r}")
        if index < 0 or (self._size is not None and index >= self._size):
            bound = "0 or more" if self._size is None else f"0 to {self._size - 1}"
            raise IndexError(f"index: {bound} in the {self.split} split, got {index}")
        stream = (self.seed * len(SPLITS) + SPLITS.index(self.split)) * len(_PURPOSES) + _PURPOSES.index(purpose)
        return Draws(stream, index)


def collate(examples: Sequence[Example]) -> Batch:
    """Draws the images of examples of one task and puts them into one batch."""
    images = [[render(scene) for scene in example.scenes] for example in examples]
    return Batch(
        torch.from_numpy(np.array(images, dtype=np.uint8)),
        [example.text for example in examples],
        torch.tensor([example.target for example in examples], dtype=torch.int64),
        tuple(examples),
    )


def training_scene_items(scene: Scene, draws: Draws, questions: int = 2, hypotheses: int = 2) -> SceneItems:
    """A caption, some VQA items and some SNLI-VE items about one scene, balanced as well as one scene allows."""
    content = scene.content
    asked = [ask(content, draws) for _ in range(questions)]
    proposed = [propose(content, draws) for _ in range(hypotheses)]
    return SceneItems(
        caption(content, draws),
        [(question.text, ANSWER_OF[question.answer]) for question in asked],
        [(hypothesis.text, hypothesis.label(content)) for hypothesis in proposed],
    )


def training_pair_items(scenes: tuple[Scene, Scene], draws: Draws, statements: int = 2) -> list[tuple[str, int]]:
    """NLVR2 items (text, class in TRUTHS) about two scenes, true and false equally likely."""
    left, right = scenes[0].content, scenes[1].content
    stated = [state(left, right, draws) for _ in range(statements)]
    return [(statement.text, int(statement.truth(left, right))) for statement in stated]


def _columns(items: list[tuple[str, int]]) -> tuple[list[str], Tensor]:
    return [text for text, _ in items], torch.tensor([target for _, target in items], dtype=torch.int64)
