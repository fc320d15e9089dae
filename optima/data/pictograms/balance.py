"""Prints how far a task can be solved without looking: `python -m optima.data.pictograms.balance`.

For each task on each held-out split:

- chance: picks among the answers an item's type allows, each equally likely;
- majority: always says the answer most frequent on the split, within each type of item;
- text (train): says for every text the most frequent answer to this very text on train, and falls back to the
  type's most frequent answer on train;
- template (bound): says for every wording, nouns removed, the answer most frequent on the split itself: what a guesser
  could reach at best that knows the test's statistics but no noun's;
- cover (bound): the same, and it may look whether there is a cover, at nothing else. Only SNLI-VE is about the cover.
  A cover turns the one label of "there is a dog" that needs no cover into neutral, so this guesser gets two thirds of
  SNLI-VE right: a model has to beat that to have seen objects.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from optima.data.pictograms.kinds import KINDS
from optima.data.pictograms.questions import PLACES
from optima.data.pictograms.stream import Example, Pictograms
from optima.task import LABELS, TASKS, TRUTHS, Task

_NOUN = {word: "noun" for kind in KINDS for word in (kind.name, kind.plural)} | {"an": "a"}


@dataclass(frozen=True)
class Balance:
    """Accuracies in 0..1 of guessers that see no image, on `items` items."""

    items: int
    chance: float
    majority: float
    text: float
    template: float
    cover: float


def measure(task: Task, train: Sequence[Example], held_out: Sequence[Example]) -> Balance:
    """How well the guessers described above do on held-out examples of a task, the text one fitted on train."""
    return Balance(
        len(held_out),
        sum(1 / len(possible_answers(example)) for example in held_out) / len(held_out),
        _accuracy(held_out, held_out, lambda example: example.kind),
        _accuracy(train, held_out, lambda example: example.text),
        _accuracy(held_out, held_out, lambda example: template_of(example.text)),
        _accuracy(
            held_out,
            held_out,
            lambda example: (template_of(example.text), *(scene.cover is None for scene in example.scenes)),
        ),
    )


def possible_answers(example: Example) -> tuple[str, ...]:
    """The answers that items of this task and type can have."""
    if example.task == "nlvr2":
        return TRUTHS
    if example.task == "snli_ve":
        return LABELS
    if example.kind in ("how_many", "how_many_all"):
        return ("one", "two", "three", "four")
    if example.kind == "where":
        return PLACES
    if example.kind == "is_there":
        return ("yes", "no")
    return tuple(kind.name for kind in KINDS)


def template_of(text: str) -> str:
    """The text with every noun replaced by the same word."""
    return " ".join(_NOUN.get(word, word) for word in text.split())


def _accuracy(fitted_on: Sequence[Example], tested_on: Sequence[Example], key: Callable[[Example], Hashable]) -> float:
    by_key: defaultdict[Hashable, Counter[str]] = defaultdict(Counter)
    by_type: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in fitted_on:
        by_key[key(example)][example.answer] += 1
        by_type[example.kind][example.answer] += 1
    guesses = (by_key.get(key(example)) or by_type[example.kind] for example in tested_on)
    right = sum(guess.most_common(1)[0][0] == example.answer for guess, example in zip(guesses, tested_on, strict=True))
    return right / len(tested_on)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how well each task can be solved without looking.")
    parser.add_argument(
        "--train-items", type=int, default=20000, help="training items per task to fit the text guesser"
    )
    parser.add_argument("--items", type=int, default=2000, help="held-out items per task and split")
    arguments = parser.parse_args()
    table = Table("task", "split", "items", "chance", "majority", "text (train)", "template (bound)", "cover (bound)")
    train = Pictograms("train")
    for task in TASKS:
        if task == "captioning":
            continue
        fitted_on = [train.example(task, index) for index in range(arguments.train_items)]
        for split in ("validation", "test"):
            held_out = Pictograms(split, size=arguments.items)
            found = measure(task, fitted_on, [held_out.example(task, index) for index in range(len(held_out))])
            shares = (found.chance, found.majority, found.text, found.template, found.cover)
            table.add_row(task, split, str(found.items), *(f"{100 * share:.1f} %" for share in shares))
    Console().print(table)


if __name__ == "__main__":
    main()
