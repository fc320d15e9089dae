"""What an image shows: groups of objects, where each object stands, the cover and the background.

A scene has one or two groups. A group is one to four objects of one kind, and a scene has one to four objects. Two
groups stand in opposite halves of the image, and along the other axis they overlap: exactly one of "to the left
of", "to the right of", "above" and "below" holds. A cover is an opaque panel over a spot where no object stands:
something could be behind it, and that is what makes a hypothesis neutral.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from optima.data.draws import Draws
from optima.data.pictograms.atlas import LARGEST, SMALLEST, extent

SIDE = 64
"""Width and height of an image in pixels."""

Axis = Literal["horizontal", "vertical"]


class Box(NamedTuple):
    """A rectangle in pixels, from (left, top) to (right, bottom), the latter excluded."""

    left: int
    top: int
    right: int
    bottom: int

    def overlaps(self, other: "Box", slack: int) -> bool:
        """Whether the boxes share more than `slack` pixels in width and in height."""
        return (
            self.left + slack < other.right
            and other.left + slack < self.right
            and self.top + slack < other.bottom
            and other.top + slack < self.bottom
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Objects of one kind standing together."""

    kind: int
    count: int


@dataclass(frozen=True, slots=True)
class Content:
    """What is to be seen, without where exactly.

    With two groups, `axis` says how they are arranged and `groups[0]` is the left or the upper one. With one group
    `axis` is None. `covered` says whether a cover hides a part of the image.
    """

    groups: tuple[Group, ...]
    axis: Axis | None
    covered: bool

    @property
    def total(self) -> int:
        """Number of objects."""
        return sum(group.count for group in self.groups)

    def count(self, kind: int) -> int:
        """How many objects of the kind can be seen."""
        return sum(group.count for group in self.groups if group.kind == kind)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its kind, the length of its longer side, and where it stands, in pixels."""

    kind: int
    size: int
    box: Box


@dataclass(frozen=True, slots=True)
class Background:
    """How the image's ground is painted; see `render` for the patterns."""

    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    slope: int
    pattern: int
    shift: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """An image before it is drawn."""

    content: Content
    things: tuple[Thing, ...]
    cover: Box | None
    background: Background


SLACK = 1
"""Boxes of two objects may share this many pixels; emoji rarely fill the corners of theirs."""
GAP = 2
"""Pixels kept free on either side of the line between two groups."""
OVERLAP = 5
"""Pixels that two groups side by side at least have in common along the other axis."""
SLOPES, PATTERNS = 9, 13

_WHOLE = Box(0, 0, SIDE, SIDE)
_HALVES: dict[Axis, tuple[Box, Box]] = {
    "horizontal": (Box(0, 0, SIDE // 2 - GAP, SIDE), Box(SIDE // 2 + GAP, 0, SIDE, SIDE)),
    "vertical": (Box(0, 0, SIDE, SIDE // 2 - GAP), Box(0, SIDE // 2 + GAP, SIDE, SIDE)),
}


def compose(content: Content, draws: Draws) -> Scene:
    """Places the content's objects and cover at random and chooses a background."""
    background = _paint(draws)
    largest = LARGEST
    while True:
        cover = _place_cover(draws) if content.covered else None
        things = _place_things(content, cover, largest, draws)
        if things is not None:
            return Scene(content, things, cover, background)
        largest = max(SMALLEST, largest - 2)


def _place_cover(draws: Draws) -> Box:
    width, height = draws.between(17, 22), draws.between(24, 28)
    if draws.chance(0.5):
        width, height = height, width
    left, top = draws.between(0, SIDE - width), draws.between(0, SIDE - height)
    return Box(left, top, left + width, top + height)


def _place_things(content: Content, cover: Box | None, largest: int, draws: Draws) -> tuple[Thing, ...] | None:
    """Puts each object at a random free place, or gives up with None."""
    if content.axis is None:
        return _place_group(content.groups[0], _WHOLE, (), cover, largest, draws)
    first_half, second_half = _HALVES[content.axis]
    first = _place_group(content.groups[0], first_half, (), cover, largest, draws)
    if first is None:
        return None
    second = _place_group(content.groups[1], second_half, first, cover, largest, draws)
    return None if second is None else first + second


def _place_group(
    group: Group, room: Box, opposite: tuple[Thing, ...], cover: Box | None, largest: int, draws: Draws
) -> tuple[Thing, ...] | None:
    """Places one group in its room; its first object is put side by side with the opposite group, if there is one."""
    things: list[Thing] = []
    for member in range(group.count):
        for _ in range(12):
            size = draws.between(SMALLEST, largest)
            width, height = extent(group.kind, size)
            lefts, tops = (room.left, room.right - width), (room.top, room.bottom - height)
            if opposite and member == 0:
                if room.bottom - room.top == SIDE:
                    tops = _beside(opposite, 1, height)
                else:
                    lefts = _beside(opposite, 0, width)
            left, top = draws.between(*lefts), draws.between(*tops)
            box = Box(left, top, left + width, top + height)
            if cover is not None and box.overlaps(cover, 0):
                continue
            if any(box.overlaps(thing.box, SLACK) for thing in things):
                continue
            things.append(Thing(group.kind, size, box))
            break
        else:
            return None
    return tuple(things)


def _beside(opposite: tuple[Thing, ...], axis: int, length: int) -> tuple[int, int]:
    """First and last place along the axis (0 = x, 1 = y) at which a box of this length overlaps the opposite group."""
    low = min(thing.box[axis] for thing in opposite) + OVERLAP - length
    high = max(thing.box[axis + 2] for thing in opposite) - OVERLAP
    return max(0, low), min(SIDE - length, high)


def _paint(draws: Draws) -> Background:
    first, second = _colour(draws), _colour(draws)
    slope = draws.between(1, SLOPES - 1) if draws.chance(0.5) else 0
    pattern = draws.between(1, PATTERNS - 1) if draws.chance(0.5) else 0
    return Background((first, second), slope, pattern, (draws.below(SIDE), draws.below(SIDE)))


def _colour(draws: Draws) -> tuple[int, int, int]:
    """A colour of any hue, mostly light and never vivid, so that emoji stand out."""
    light = 130 + 115 * draws.unit()
    vivid = 0.5 * draws.unit()
    red, green, blue = (int(light * (1 - vivid * draws.unit())) for _ in range(3))
    return red, green, blue
