"""Labels agree with an enumeration of every world that an image leaves possible."""

from itertools import product

import pytest
from pictograms_oracle import PHRASES, SINGULAR, WORD, seen, stands

from optima.data.pictograms import Pictograms, Scene, snli_ve
from optima.task import LABELS

World = tuple[dict[str, int], dict[tuple[str, str], str]]


def worlds(scene: Scene, nouns: tuple[str, ...]) -> list[World]:
    """Every world that looks like the image, as far as the nouns are concerned.

    A world is how many of each noun there are and how two kinds that are both there stand to each other. What is seen
    is there; a cover may hide up to five more of each kind; kinds that are both seen stand as they are seen to.
    """
    there = {noun: len(seen(scene).get(noun, [])) for noun in nouns}
    extras = range(6) if scene.cover is not None else range(1)
    found: list[World] = []
    for more in product(extras, repeat=len(nouns)):
        counts = {noun: there[noun] + extra for noun, extra in zip(nouns, more, strict=True)}
        if len(nouns) == 1:
            found.append((counts, {}))
            continue
        if not all(counts.values()):
            found.append((counts, {}))
        elif all(there.values()):
            (phrase,) = stands(scene, *nouns)
            found.append((counts, {nouns: phrase}))
        else:
            found += [(counts, {nouns: phrase}) for phrase in PHRASES]
    return found


def holds(text: str, world: World) -> bool:
    """Whether the hypothesis, read word by word, is true in the world."""
    counts, relations = world
    words = text.split()
    if words[0] != "there":
        return relations.get((words[1], words[-1])) == " ".join(words[3:-2])
    number = counts[SINGULAR[words[-1]]]
    if words[2] == "no":
        return number == 0
    if words[2] == "at":
        return number >= WORD[words[4]]
    if words[2] == "exactly":
        return number == WORD[words[3]]
    return number > 0


def label(text: str, scene: Scene) -> str:
    words = text.split()
    nouns = (SINGULAR[words[-1]],) if words[0] == "there" else (words[1], words[-1])
    truths = {holds(text, world) for world in worlds(scene, nouns)}
    return "neutral" if len(truths) == 2 else "entailment" if truths == {True} else "contradiction"


def test_every_hypothesis_about_a_scene_has_the_label_that_its_possible_worlds_imply(seed: int) -> None:
    images = Pictograms("train", seed)
    for index in range(12):
        scene = images.scene(index)
        for hypothesis in snli_ve(scene)[:: 1 if index < 2 else 17]:
            assert hypothesis.answer == label(hypothesis.text, scene), f"scene {index} of seed {seed}: {hypothesis}"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_items_have_the_label_that_the_possible_worlds_imply(split: str, seed: int) -> None:
    images = Pictograms(split, seed)
    for index in range(1000):
        item = images.example("snli_ve", index)
        assert item.answer == label(item.text, item.scenes[0]), f"item {index} of seed {seed}: {item}"
        assert LABELS[item.target] == item.answer


def test_each_template_carries_each_label_equally_often_and_a_cover_does_not_decide(seed: int) -> None:
    images = Pictograms("train", seed)
    items = [images.example("snli_ve", index) for index in range(4000)]
    for template in {item.kind for item in items}:
        answers = [item.answer for item in items if item.kind == template]
        for name in LABELS:
            assert abs(answers.count(name) / len(answers) - 1 / 3) < 0.09, f"{template} {name} seed {seed}"
    covered = [item.answer for item in items if item.scenes[0].cover is not None]
    assert covered.count("neutral") / len(covered) < 0.72, f"seed {seed}"
