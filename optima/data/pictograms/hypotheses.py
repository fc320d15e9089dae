"""Visual entailment: does an image prove a hypothesis, disprove it, or leave it open?

The image shows a small world in which each kind stands together, in one group on one side of the others. A cover
may hide anything at all: more of a kind that is seen, another kind, or nothing. Where it is and how large it is does
not matter. Without a cover, what is seen is all there is. So, with n the objects of the kind that are seen:

| template   | hypothesis                     | entailment         | contradiction                        | else    |
|------------|--------------------------------|--------------------|--------------------------------------|---------|
| `exists`   | there is a dog                 | n >= 1             | n = 0 without cover                  | neutral |
| `absent`   | there is no dog                | n = 0 without cover| n >= 1                               | neutral |
| `at_least` | there are at least two dogs    | n >= 2             | n < 2 without cover                  | neutral |
| `exactly`  | there are exactly two dogs     | n = 2 without cover| n > 2, or n < 2 without cover        | neutral |
| `relation` | a dog is to the left of a cat  | both seen so       | both seen otherwise, cover or not;   | neutral |
|            |                                |                    | one or both not seen, without cover  |         |

`relation` is settled once both kinds are seen, because hidden ones of a kind would stand on the same side.
"""

from typing import NamedTuple

from optima.data.draws import Draws
from optima.data.pictograms.captions import NUMBERS, RELATIONS, relation_of
from optima.data.pictograms.combinations import MOST, Stock, arrange
from optima.data.pictograms.kinds import KINDS
from optima.data.pictograms.questions import absent_kind
from optima.data.pictograms.scene import Content, Scene
from optima.task import LABELS

"""The index is the class."""
ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)
HYPOTHESIS_TEMPLATES = ("exists", "absent", "at_least", "exactly", "relation")


class Hypothesis(NamedTuple):
    """A hypothesis: template, the kind it is about, and for some templates a number, or a relation to another kind."""

    template: str
    kind: int
    number: int = 0
    relation: int = 0
    other: int = 0

    @property
    def text(self) -> str:
        """The hypothesis in words."""
        kind = KINDS[self.kind]
        if self.template == "exists":
            return f"there is {kind.one}"
        if self.template == "absent":
            return f"there is no {kind.name}"
        if self.template == "at_least":
            return f"there are at least {NUMBERS[self.number]} {kind.plural}"
        if self.template == "exactly":
            return f"there are exactly {NUMBERS[self.number]} {kind.plural}"
        return f"{kind.one} is {RELATIONS[self.relation]} {KINDS[self.other].one}"

    def label(self, content: Content) -> int:
        """ENTAILMENT, NEUTRAL or CONTRADICTION, by the table above."""
        seen, covered = content.count(self.kind), content.covered
        if self.template == "relation":
            if seen and content.count(self.other):
                first = 0 if content.groups[0].kind == self.kind else 1
                return ENTAILMENT if relation_of(content, first) == self.relation else CONTRADICTION
            return NEUTRAL if covered else CONTRADICTION
        if self.template == "absent":
            return CONTRADICTION if seen else NEUTRAL if covered else ENTAILMENT
        if self.template == "exactly":
            if seen > self.number:
                return CONTRADICTION
            return NEUTRAL if covered else ENTAILMENT if seen == self.number else CONTRADICTION
        if seen >= (1 if self.template == "exists" else self.number):
            return ENTAILMENT
        return NEUTRAL if covered else CONTRADICTION


class JudgedHypothesis(NamedTuple):
    """A hypothesis in words, its template, and its label (one of LABELS) for some scene."""

    kind: str
    text: str
    answer: str


def snli_ve(scene: Scene) -> tuple[JudgedHypothesis, ...]:
    """Every hypothesis of the language, judged by the scene: 48 kinds in each template, and all pairs in `relation`."""
    kinds = range(len(KINDS))
    every = [Hypothesis(template, kind) for template in ("exists", "absent") for kind in kinds]
    every += [Hypothesis(t, kind, n) for t in ("at_least", "exactly") for kind in kinds for n in range(2, MOST + 1)]
    every += [
        Hypothesis("relation", kind, 0, relation, other)
        for kind in kinds
        for other in kinds
        for relation in range(len(RELATIONS))
        if kind != other
    ]
    return tuple(JudgedHypothesis(h.template, h.text, LABELS[h.label(scene.content)]) for h in every)


def draw_hypothesis(stock: Stock, draws: Draws) -> tuple[Hypothesis, Content]:
    """A hypothesis and a content to judge it by: the text, then the label, then a content that gives it.

    Whether there is a cover says as little about the label as it can: half the images that need none have one.
    """
    template = draws.pick(HYPOTHESIS_TEMPLATES)
    label = draws.below(3)
    if template == "relation":
        return _draw_relation(label, stock, draws)
    kind = draws.below(len(KINDS))
    if template in ("exists", "absent"):
        seen = label == (ENTAILMENT if template == "exists" else CONTRADICTION)
        groups = stock.with_kind(kind, draws) if seen else stock.without_kind(kind, draws)
        covered = draws.chance(0.5) if seen else label == NEUTRAL
        return Hypothesis(template, kind), arrange(groups, draws, covered)
    number = draws.between(2, MOST)
    while not stock.can_show(kind, number):
        kind = draws.below(len(KINDS))
    hypothesis = Hypothesis(template, kind, number)
    if template == "at_least":
        counts = range(number, MOST + 1) if label == ENTAILMENT else range(number)
        covered = draws.chance(0.5) if label == ENTAILMENT else label == NEUTRAL
    elif label == ENTAILMENT:
        counts, covered = range(number, number + 1), False
    elif label == NEUTRAL:
        counts, covered = range(number + 1), True
    elif number < MOST and draws.chance(0.5):
        counts, covered = range(number + 1, MOST + 1), draws.chance(0.5)
    else:
        counts, covered = range(number), False
    count = draws.pick([count for count in counts if count == 0 or stock.can_show(kind, count)] or [0])
    groups = stock.with_count(kind, count, draws) if count else stock.without_kind(kind, draws)
    return hypothesis, arrange(groups, draws, covered)


def _draw_relation(label: int, stock: Stock, draws: Draws) -> tuple[Hypothesis, Content]:
    first, second = draws.pick(stock.pairs)
    if draws.chance(0.5):
        first, second = second, first
    hypothesis = Hypothesis("relation", first, 0, draws.below(len(RELATIONS)), second)
    if label == ENTAILMENT or (label == CONTRADICTION and draws.chance(0.5)):
        while True:
            content = arrange(stock.pair_of(first, second, draws), draws, draws.chance(0.5))
            if hypothesis.label(content) == label:
                return hypothesis, content
    while True:
        shown = draws.pick((first, second, -1))
        groups = stock.any(draws) if shown < 0 else stock.with_kind(shown, draws)
        if {group.kind for group in groups} != {first, second}:
            return hypothesis, arrange(groups, draws, label == NEUTRAL)


def propose(content: Content, draws: Draws) -> Hypothesis:
    """A random hypothesis about a given content, the labels it can get as balanced as one content allows.

    With a cover a hypothesis is neutral three times in five; without one it never is.
    """
    label = draws.weighted((0, 1, 2), (0.2, 0.6, 0.2) if content.covered else (0.5, 0.0, 0.5))
    while True:
        hypothesis = _guess(label, content, draws)
        if hypothesis.label(content) == label:
            return hypothesis


def _guess(label: int, content: Content, draws: Draws) -> Hypothesis:
    """A hypothesis likely to have the label."""
    template = draws.pick(HYPOTHESIS_TEMPLATES)
    group = draws.pick(content.groups)
    if template == "relation":
        if content.axis is not None and (label == ENTAILMENT or (label == CONTRADICTION and draws.chance(0.7))):
            first = draws.below(2)
            relation = relation_of(content, first)
            if label == CONTRADICTION:
                relation = (relation + draws.between(1, 3)) % len(RELATIONS)
            kind, other = content.groups[first].kind, content.groups[1 - first].kind
            return Hypothesis(template, kind, 0, relation, other)
        kind = group.kind if draws.chance(0.7) else absent_kind(content, draws)
        other = absent_kind(content, draws)
        while other == kind:
            other = absent_kind(content, draws)
        if draws.chance(0.5):
            kind, other = other, kind
        return Hypothesis(template, kind, 0, draws.below(len(RELATIONS)), other)
    if template in ("exists", "absent"):
        seen = label == (ENTAILMENT if template == "exists" else CONTRADICTION)
        return Hypothesis(template, group.kind if seen else absent_kind(content, draws))
    if label == ENTAILMENT:
        number = group.count if template == "exactly" else draws.between(2, max(2, group.count))
        return Hypothesis(template, group.kind, max(2, number))
    kind = group.kind if draws.chance(0.6) else absent_kind(content, draws)
    return Hypothesis(template, kind, draws.weighted((2, 3, 4), (0.5, 0.3, 0.2)))
