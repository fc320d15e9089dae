"""Runs a model over a split and scores what it says."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optima.coca import CoCa
from optima.coca.generate import generate
from optima.data.pictograms.captions import describe, parse_caption
from optima.data.pictograms.stream import CLASSES, Example, Pictograms, Task
from optima.data.pictures import normalise
from optima.data.tokenizer import Tokenizer
from optima.tasks.spec import TEXT_LENGTH


@dataclass(frozen=True)
class Evaluation:
    """Scores in percent by name, and each example's prediction in words with whether it is right."""

    scores: dict[str, float]
    predictions: list[str]
    correct: list[bool]


@torch.no_grad()
def evaluate(
    model: CoCa, task: Task, data: Pictograms, tokenizer: Tokenizer, *, limit: int = 0, batch_size: int = 250
) -> Evaluation:
    """Scores the model on a held-out split; `limit` > 0 takes only that many items from its beginning.

    Captioning: `scene_accuracy`, captions that name kinds, counts and relation rightly; `kind_accuracy`, captions
        that name
    the right kinds; `count_accuracy`, the right kinds with the right counts. The others: `accuracy`, and one score
    per type of question or template, `accuracy/<type>`.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    examples: list[Example] = []
    predictions: list[str] = []
    total = min(len(data), limit) if limit else len(data)
    for start in range(0, total, batch_size):
        batch = data.batch(task, start, min(batch_size, total - start))
        images = normalise(batch.images.to(device))
        examples += batch.examples
        if task == "captioning":
            tokens = generate(
                model, images[:, 0], start_id=tokenizer.start_id, end_id=tokenizer.end_id, length=TEXT_LENGTH
            )
            predictions += tokenizer.decode(tokens)
        else:
            output = model(images, tokenizer.encode(batch.texts, TEXT_LENGTH).to(device))
            classes = model.class_logits(task, output).argmax(dim=-1)
            predictions += [CLASSES[task][answer] for answer in classes.tolist()]
    model.train(was_training)
    if task == "captioning":
        return _score_captions(predictions, examples)
    correct = [said == example.answer for said, example in zip(predictions, examples, strict=True)]
    scores = {"accuracy": _percent(correct)}
    for kind in sorted({example.kind for example in examples}):
        right = [good for good, example in zip(correct, examples, strict=True) if example.kind == kind]
        scores[f"accuracy/{kind}"] = _percent(right)
    return Evaluation(scores, predictions, correct)


def _score_captions(captions: list[str], examples: Sequence[Example]) -> Evaluation:
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
        "scene_accuracy": _percent(correct),
        "kind_accuracy": _percent(kinds),
        "count_accuracy": _percent(counts),
    }
    return Evaluation(scores, captions, correct)


def _percent(outcomes: Sequence[bool]) -> float:
    return 100 * sum(outcomes) / len(outcomes)
