"""The embedded pictograms in the role of one task: drawn on the fly, with ground truth known exactly."""

from collections import Counter
from collections.abc import Sequence

import torch

from optima.data.pictograms.captions import describe, parse_caption, references
from optima.data.pictograms.render import render
from optima.data.pictograms.stream import CLASSES, Example, Pictograms, Task
from optima.data.tokenizer import Tokenizer, word_tokenizer
from optima.tasks.batches import TaskBatch, load_batch
from optima.tasks.data import Evaluation, Held, Shown, percent
from optima.tasks.spec import HEADLINE, PICTURE_SIZE, TEXT_LENGTH


class PictogramTask:
    """`optima.tasks.data.TaskData` over pictograms.

    Scores of captioning: `scene_accuracy`, captions that name kinds, counts and relation rightly; `kind_accuracy`,
    captions that name the right kinds; `count_accuracy`, the right kinds with the right counts. Of the others:
    `accuracy`, and one score per type of question or template, `accuracy/<type>`.
    """

    name = "pictograms"
    picture_size = PICTURE_SIZE
    text_length = TEXT_LENGTH

    def __init__(self, task: Task, seed: int, device: torch.device) -> None:
        self.task: Task = task
        self.tokenizer: Tokenizer = word_tokenizer()
        self.headline = HEADLINE[task]
        self.classes = CLASSES[task]
        self._device = device
        self._train = Pictograms("train", seed)
        self._held = {"validation": Pictograms("validation"), "test": Pictograms("test")}

    def training_batch(self, step: int, size: int) -> TaskBatch:
        return self._batch(self._train, step * size, size)

    def held_batch(self, split: Held, start: int, size: int) -> TaskBatch:
        return self._batch(self._held[split], start, size)

    def items(self, split: Held) -> int:
        return len(self._held[split])

    def score(self, split: Held, predictions: Sequence[str]) -> Evaluation:
        examples = [self._held[split].example(self.task, index) for index in range(len(predictions))]
        if self.task == "captioning":
            return _score_captions(predictions, examples)
        correct = [said == example.answer for said, example in zip(predictions, examples, strict=True)]
        scores = {"accuracy": percent(correct)}
        for kind in sorted({example.kind for example in examples}):
            right = [good for good, example in zip(correct, examples, strict=True) if example.kind == kind]
            scores[f"accuracy/{kind}"] = percent(right)
        return Evaluation(scores, list(predictions), correct)

    def shown(self, split: Held, index: int) -> Shown:
        example = self._held[split].example(self.task, index)
        pictures = tuple(render(scene) for scene in example.scenes)
        if self.task == "captioning":
            return Shown(pictures, None, references(example.scenes[0])[0])
        return Shown(pictures, example.text, example.answer)

    def _batch(self, data: Pictograms, start: int, size: int) -> TaskBatch:
        return load_batch(data, self.task, start, size, self.tokenizer, self._device)


def _score_captions(captions: Sequence[str], examples: Sequence[Example]) -> Evaluation:
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
    return Evaluation(scores, list(captions), correct)
