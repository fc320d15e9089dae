"""Ground truth recomputed from where the objects stand, without the package's own semantics."""

from itertools import pairwise

from optima.data.pictograms import KINDS, Scene

WORD = {word: number for number, word in enumerate(("no", "one", "two", "three", "four"))}
SINGULAR = {name: kind.name for kind in KINDS for name in (kind.name, kind.plural)}
PHRASES = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def seen(scene: Scene) -> dict[str, list[tuple[float, float]]]:
    """Noun -> centres of the objects of that kind."""
    centres: dict[str, list[tuple[float, float]]] = {}
    for thing in scene.things:
        box = thing.box
        centre = ((box.left + box.right) / 2, (box.top + box.bottom) / 2)
        centres.setdefault(KINDS[thing.kind].name, []).append(centre)
    return centres


def stands(scene: Scene, first: str, second: str) -> set[str]:
    """The phrases that say beyond doubt how all objects of the first kind stand to all of the second.

    A phrase holds if all boxes of the one are past all boxes of the other along its axis while the two groups overlap
    along the other axis.
    """
    boxes = {noun: [t.box for t in scene.things if KINDS[t.kind].name == noun] for noun in (first, second)}
    holding = set()
    for phrase, (axis, sign) in PHRASES.items():
        low, high = (first, second) if sign < 0 else (second, first)
        apart = max(box[axis + 2] for box in boxes[low]) <= min(box[axis] for box in boxes[high])
        across = 1 - axis
        shared = min(max(box[across + 2] for box in group) for group in boxes.values()) - max(
            min(box[across] for box in group) for group in boxes.values()
        )
        if apart and shared > 0:
            holding.add(phrase)
    return holding


def groups_of(text: str) -> list[tuple[str, int]]:
    """(noun, count) for every "a dog", "three dogs" in the text, in order."""
    words = text.split()
    found = []
    for before, noun in pairwise(words):
        if noun in SINGULAR and (before in ("a", "an") or before in WORD):
            found.append((SINGULAR[noun], 1 if before in ("a", "an") else WORD[before]))
    return found
