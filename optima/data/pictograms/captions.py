"""Captions: what is true of a whole image, as text and back.

An image of one group has one caption, "three cats". An image of two groups has two, one for either order of naming
them: "a dog to the left of two pizzas", "two pizzas to the right of a dog".
"""

from typing import NamedTuple

from optima.data.draws import Draws
from optima.data.pictograms.kinds import KINDS
from optima.data.pictograms.scene import Content, Group, Scene

NUMBERS = ("no", "one", "two", "three", "four")
"""Number words by value; as a determiner, "one" is said "a" or "an"."""
RELATIONS = ("to the left of", "to the right of", "above", "below")
"""How the group named first stands to the other. Relations 2 i and 2 i + 1 are each other's converse."""


class Description(NamedTuple):
    """What a caption says: groups from left to right or top to bottom; relation is a number in RELATIONS, or None."""

    groups: tuple[Group, ...]
    relation: int | None


def relation_of(content: Content, first: int) -> int:
    """Number in RELATIONS of how group `first` (0 or 1) of a two-group content stands to the other."""
    return (0 if content.axis == "horizontal" else 2) + first


def describe(content: Content) -> Description:
    """What the right captions of the content say."""
    return Description(content.groups, None if content.axis is None else relation_of(content, 0))


def name_group(group: Group) -> str:
    """ "a dog", "three dogs"."""
    kind = KINDS[group.kind]
    return kind.one if group.count == 1 else f"{NUMBERS[group.count]} {kind.plural}"


def references(scene: Scene) -> tuple[str, ...]:
    """Every right caption of the scene: one, or two if it has two groups."""
    content = scene.content
    return tuple(_caption(content, first) for first in range(len(content.groups)))


def caption(content: Content, draws: Draws) -> str:
    """One of the right captions, either group named first."""
    return _caption(content, draws.below(len(content.groups)))


def _caption(content: Content, first: int) -> str:
    name = name_group(content.groups[first])
    if content.axis is None:
        return name
    return f"{name} {RELATIONS[relation_of(content, first)]} {name_group(content.groups[1 - first])}"


_GROUP_OF = {name_group(Group(kind, count)): Group(kind, count) for kind in range(len(KINDS)) for count in range(1, 5)}


def parse_caption(text: str) -> Description | None:
    """What the caption says, the same for either order of naming; None if the text is no caption of this language."""
    text = " ".join(text.split())
    if text in _GROUP_OF:
        return Description((_GROUP_OF[text],), None)
    for number, relation in enumerate(RELATIONS):
        head, separator, tail = text.partition(f" {relation} ")
        if separator and head in _GROUP_OF and tail in _GROUP_OF:
            groups = (_GROUP_OF[head], _GROUP_OF[tail])
            return Description(groups[::-1] if number % 2 else groups, number - number % 2)
    return None


def describes(text: str, scene: Scene) -> bool:
    """Whether the text is a right caption of the scene: kinds, counts and relation, in either order of naming."""
    return parse_caption(text) == describe(scene.content)
