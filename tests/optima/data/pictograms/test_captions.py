"""Captions say what is true, parse back, and wrong ones are found out."""

from collections.abc import Iterator

import pytest
from pictograms_oracle import PHRASES, groups_of, seen, stands

from optima.data.pictograms import KINDS, Pictograms, describes, parse_caption, references

KIND = {kind.name: kind for kind in KINDS}


def test_references_say_what_the_objects_places_imply(seed: int) -> None:
    images = Pictograms("train", seed)
    for index in range(1500):
        scene = images.scene(index)
        counts = {noun: len(places) for noun, places in seen(scene).items()}
        texts = references(scene)
        assert len(set(texts)) == len(texts) == len(counts)
        for text in texts:
            named = groups_of(text)
            assert dict(named) == counts
            if len(named) == 2:
                (phrase,) = (phrase for phrase in PHRASES if phrase in text)
                assert phrase in stands(scene, named[0][0], named[1][0]), f"scene {index} of seed {seed}: {text}"


def test_a_caption_parses_to_the_same_description_in_either_order_and_describes_its_scene(seed: int) -> None:
    images = Pictograms("validation", seed)
    for index in range(500):
        scene = images.scene(index)
        assert len({parse_caption(text) for text in references(scene)}) == 1
        assert all(describes(text, scene) for text in references(scene))
        assert describes(images.example("captioning", index).text, images.example("captioning", index).scenes[0])


def wrong_captions(text: str) -> Iterator[str]:
    """The caption with one noun, one count or the relation changed."""
    words = text.split()
    for place in range(1, len(words)):
        found = groups_of(" ".join(words[place - 1 : place + 1]))
        if not found:
            continue
        noun, count = found[0]
        others = [(other, count) for other in KINDS if other.name != noun]
        others += [(KIND[noun], other) for other in (1, 2, 3, 4) if other != count]
        for kind, number in others:
            name = kind.one if number == 1 else f"{('two', 'three', 'four')[number - 2]} {kind.plural}"
            yield " ".join([*words[: place - 1], name, *words[place + 1 :]])
    for phrase in PHRASES:
        for other in PHRASES:
            if f" {phrase} " in text and other != phrase:
                yield text.replace(f" {phrase} ", f" {other} ")


def test_a_caption_with_one_thing_wrong_does_not_describe_the_scene(seed: int) -> None:
    images = Pictograms("train", seed)
    for index in range(100):
        scene = images.scene(index)
        for text in references(scene):
            for wrong in wrong_captions(text):
                assert parse_caption(wrong) is not None, wrong
                assert not describes(wrong, scene), f"scene {index} of seed {seed}: {wrong}"


@pytest.mark.parametrize(
    "text",
    ["", "dog", "a dogs", "two dog", "one dog", "five dogs", "a dog above", "a dog above a", "above a dog", "a owl"],
)
def test_text_outside_the_language_has_no_description(text: str) -> None:
    assert parse_caption(text) is None


def test_parsing_forgives_spacing_only() -> None:
    assert parse_caption("  two  dogs above a cat ") == parse_caption("a cat below two dogs")
