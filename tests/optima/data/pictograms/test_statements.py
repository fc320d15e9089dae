"""Statements are true or false of what stands in the two images."""

import pytest
from pictograms_oracle import SINGULAR, WORD, seen

from optima.data.pictograms import Pictograms, Scene, nlvr2
from optima.task import TRUTHS


def truth(text: str, left: Scene, right: Scene) -> bool:
    """The truth of the statement, read word by word."""
    words = text.split()
    images = {"left": left, "right": right}
    if text == "both pictures show the same number of objects":
        return len(left.things) == len(right.things)
    if "more" in words:
        noun = words[words.index("more") + 1]
        more, less = (
            len(scene.things) if noun == "objects" else len(seen(scene).get(SINGULAR[noun], []))
            for scene in (images[words[1]], images[words[-2]])
        )
        return more > less
    if words[-2:] == ["in", "all"]:
        return sum(len(seen(scene).get(SINGULAR[words[3]], [])) for scene in (left, right)) == WORD[words[2]]
    showing = sum(SINGULAR[words[-1]] in seen(scene) for scene in (left, right))
    return showing == {"both": 2, "exactly": 1, "neither": 0}[words[0]]


def test_every_statement_about_two_scenes_has_the_truth_that_its_words_imply(seed: int) -> None:
    images = Pictograms("validation", seed)
    for index in range(0, 100, 2):
        left, right = images.scene(index), images.scene(index + 1)
        for statement in nlvr2(left, right):
            assert statement.answer == str(truth(statement.text, left, right)).lower(), f"{index}, {seed}: {statement}"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_items_have_the_truth_that_their_words_imply(split: str, seed: int) -> None:
    images = Pictograms(split, seed)
    for index in range(1000):
        item = images.example("nlvr2", index)
        assert len(item.scenes) == 2
        assert item.answer == str(truth(item.text, *item.scenes)).lower(), f"item {index} of seed {seed}: {item}"
        assert TRUTHS[item.target] == item.answer


def test_each_template_is_true_and_false_equally_often(seed: int) -> None:
    images = Pictograms("train", seed)
    items = [images.example("nlvr2", index) for index in range(4000)]
    for template in {item.kind for item in items}:
        answers = [item.target for item in items if item.kind == template]
        assert abs(sum(answers) / len(answers) - 0.5) < 0.1, f"{template} seed {seed}"
