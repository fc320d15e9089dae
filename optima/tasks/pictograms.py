"""The embedded pictograms in the role of one task: drawn on the fly, with ground truth known exactly."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from optima.coca import HeadSpec
from optima.data.config import Held
from optima.data.normalise import normalise
from optima.data.pictograms.captions import describe, parse_caption, references
from optima.data.pictograms.render import render
from optima.data.pictograms.stream import CLASSES, Example, Pictograms, collate
from optima.data.tokenizer import Tokenizer, word_tokenizer
from optima.task import TASKS, Task
from optima.tasks.batches import TaskBatch
from optima.tasks.data import Evaluation, HeldBatch, Shown, percent

IMAGE_SIZE = 64
"""Side of the square images, pixels."""

TEXT_LENGTH = 14
"""Tokens in a row of text, start and end included; the longest pictogram text takes fewer."""

HEADS: dict[str, HeadSpec] = {
    task: HeadSpec(len(CLASSES[task]), images=spec.images) for task, spec in TASKS.items() if CLASSES[task]
}
"""The classification heads of a CoCa that does all four tasks."""

HEADLINE: dict[Task, str] = {task: spec.headline for task, spec in TASKS.items()} | {"captioning": "scene_accuracy"}
"""The score that a task is judged by, in percent: of a caption of a known scene it can be told whether it is right."""


class PictogramTask:
    """`optima.tasks.data.TaskData` over pictograms.

    Scores of captioning: `scene_accuracy`, captions that name kinds, counts and relation rightly; `kind_accuracy`,
    captions that name the right kinds; `count_accuracy`, the right kinds with the right counts. Of the others:
    `accuracy`, and one score per type of question or template, `accuracy/<type>`.
    """

    name = "pictograms"
    image_size = IMAGE_SIZE
    text_length = TEXT_LENGTH

    def __init__(
        self, task: Task, seed: int = 0, device: torch.device | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self.task: Task = task
        self.tokenizer: Tokenizer = word_tokenizer()
        self.headline = HEADLINE[task]
        self.classes = CLASSES[task]
        self._device = device or torch.device("cpu")
        self._rank, self._world_size = rank, world_size
        self._train = Pictograms("train", seed)
        self._held = {"validation": Pictograms("validation"), "test": Pictograms("test")}

    def training_batch(self, number: int, size: int) -> TaskBatch:
        start = (number * self._world_size + self._rank) * size
        return self._batch(self._train, range(start, start + size))

    def probe_batch(self, size: int) -> TaskBatch:
        return self.held_batch("validation", range(min(size, len(self._held["validation"]))))

    def held_batch(self, split: Held, indices: Sequence[int]) -> TaskBatch:
        return self._batch(self._held[split], indices)

    def held_batches(
        self, split: Held, size: int, limit: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[HeldBatch]:
        total = len(self._held[split])
        total = min(total, limit) if limit else total
        for start in range(0, total, size)[share[0] :: share[1]]:
            indices = range(start, min(start + size, total))
            yield HeldBatch(list(indices), self.held_batch(split, indices))

    def unused(self, split: Held) -> int:
        return 0

    def has_truth(self, split: Held) -> bool:
        return True

    def score(self, split: Held, indices: Sequence[int], predictions: Sequence[str]) -> Evaluation:
        examples = [self._held[split].example(self.task, index) for index in indices]
        if self.task == "captioning":
            scores, correct = _score_captions(predictions, examples)
            return Evaluation(scores, list(indices), list(predictions), correct)
        correct = [said == example.answer for said, example in zip(predictions, examples, strict=True)]
        scores = {"accuracy": percent(correct)}
        for kind in sorted({example.kind for example in examples}):
            right = [good for good, example in zip(correct, examples, strict=True) if example.kind == kind]
            scores[f"accuracy/{kind}"] = percent(right)
        return Evaluation(scores, list(indices), list(predictions), correct)

    def submission(self, split: Held, indices: Sequence[int], predictions: Sequence[str]) -> tuple[str, str]:
        rows = [json.dumps({"index": i, "prediction": said}) for i, said in zip(indices, predictions, strict=True)]
        return f"pictograms_{self.task}_{split}_predictions.jsonl", "".join(f"{row}\n" for row in rows)

    def shown(self, split: Held, index: int) -> Shown:
        example = self._held[split].example(self.task, index)
        images = tuple(render(scene) for scene in example.scenes)
        if self.task == "captioning":
            return Shown(images, None, references(example.scenes[0])[0])
        return Shown(images, example.text, example.answer)

    def close(self) -> None:
        pass

    def _batch(self, data: Pictograms, indices: Sequence[int]) -> TaskBatch:
        found = collate([data.example(self.task, index) for index in indices])
        tokens = self.tokenizer.encode(found.texts, TEXT_LENGTH)
        images, targets = found.images.to(self._device), found.targets.to(self._device)
        return TaskBatch(normalise(images), tokens.to(self._device), targets)


def _score_captions(captions: Sequence[str], examples: Sequence[Example]) -> tuple[dict[str, float], list[bool]]:
    said = [parse_caption(caption) for caption in captions]
    true = [describe(example.scenes[0].content) for example in examples]
    pairs = [
        ((), right.groups) if found is None else (found.groups, right.groups)
        for found, right in zip(said, true, strict=True)
    ]
    correct = [found == right for found, right in zip(said, true, strict=True)]
    kinds = [{group.kind for group in found} == {group.kind for group in right} for found, right in pairs]
    counts = [Counter(found) == Counter(right) for found, right in pairs]
    scores = {
        "scene_accuracy": percent(correct),
        "kind_accuracy": percent(kinds),
        "count_accuracy": percent(counts),
    }
    return scores, correct
