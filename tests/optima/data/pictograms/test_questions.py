"""Answers follow from where the objects stand; every question's type, wording and answer set is as documented."""

import pytest
from pictograms_oracle import PHRASES, SINGULAR, seen, stands

from optima.data.pictograms import ANSWERS, KINDS, Pictograms, Scene, vqa

COUNTS = ("no", "one", "two", "three", "four")


def answer(text: str, scene: Scene) -> str:
    """The answer, found from the words of the question and the places of the objects."""
    words = text.split()
    there = seen(scene)
    match words[0]:
        case "how":
            number = len(scene.things) if words[2] == "objects" else len(there[SINGULAR[words[2]]])
            return COUNTS[number]
        case "is":
            return "yes" if SINGULAR[words[-1]] in there else "no"
        case "where":
            noun = SINGULAR[words[-1]]
            assert words[1] == ("is" if len(there[noun]) == 1 else "are")
            (other,) = set(there) - {noun}
            places = {"to the left of": "left", "to the right of": "right", "above": "top", "below": "bottom"}
            (phrase,) = stands(scene, noun, other)
            return places[phrase]
    if text == "what is in the picture":
        (noun,) = there
        return noun
    (phrase,) = (phrase for phrase in PHRASES if phrase in text)
    (noun,) = (
        noun for noun in there if noun != SINGULAR[words[-1]] and phrase in stands(scene, noun, SINGULAR[words[-1]])
    )
    return noun


def test_every_question_has_the_answer_that_the_places_imply(seed: int) -> None:
    images = Pictograms("train", seed)
    for index in range(300):
        scene = images.scene(index)
        questions = vqa(scene)
        assert len({question.text for question in questions}) == len(questions)
        for question in questions:
            assert question.answer == answer(question.text, scene), f"scene {index} of seed {seed}: {question}"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_items_have_the_answer_that_the_places_imply(split: str, seed: int) -> None:
    images = Pictograms(split, seed)
    for index in range(1000):
        item = images.example("vqa", index)
        assert item.answer == answer(item.text, item.scenes[0]), f"item {index} of seed {seed}: {item}"
        assert ANSWERS[item.target] == item.answer


def test_the_answers_to_each_type_are_evenly_spread(seed: int) -> None:
    images = Pictograms("test", seed, size=3000)
    answers: dict[str, list[str]] = {}
    for index in range(3000):
        item = images.example("vqa", index)
        answers.setdefault(item.kind, []).append(item.answer)
    assert len(answers) == 6
    for kind, expected in {"how_many": 4, "how_many_all": 4, "where": 4, "is_there": 2}.items():
        for word in set(answers[kind]):
            share = answers[kind].count(word) / len(answers[kind])
            assert abs(share - 1 / expected) < 0.12, f"{kind} {word} {share:.2f} seed {seed}"
    assert len(set(answers["what_beside"])) == len(KINDS)
