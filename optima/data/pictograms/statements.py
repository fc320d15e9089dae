"""Statements about two images, true or false, as in NLVR2. They speak of what can be seen.

| template      | statement                                                    |
|---------------|--------------------------------------------------------------|
| `both`        | both pictures show a dog                                     |
| `exactly_one` | exactly one picture shows a dog                              |
| `neither`     | neither picture shows a dog                                  |
| `in_all`      | there are three dogs in all                                  |
| `more_kind`   | the left picture shows more dogs than the right picture      |
| `more`        | the right picture shows more objects than the left picture   |
| `same`        | both pictures show the same number of objects                |
"""

from typing import NamedTuple

from optima.data.draws import Draws
from optima.data.pictograms.captions import NUMBERS
from optima.data.pictograms.combinations import MOST, Stock, arrange
from optima.data.pictograms.kinds import KINDS
from optima.data.pictograms.scene import Content, Group, Scene
from optima.task import TRUTHS

"""The index is the class."""
STATEMENT_TEMPLATES = ("both", "exactly_one", "neither", "in_all", "more_kind", "more", "same")
_SIDES = ("left", "right")


class Statement(NamedTuple):
    """A statement: its template and, for some, a kind, a number, or the side said to show more (0 left, 1 right)."""

    template: str
    kind: int = 0
    number: int = 0
    side: int = 0

    @property
    def text(self) -> str:
        """The statement in words."""
        kind = KINDS[self.kind]
        more, less = _SIDES[self.side], _SIDES[1 - self.side]
        match self.template:
            case "both":
                return f"both pictures show {kind.one}"
            case "exactly_one":
                return f"exactly one picture shows {kind.one}"
            case "neither":
                return f"neither picture shows {kind.one}"
            case "in_all":
                return f"there are {NUMBERS[self.number]} {kind.plural} in all"
            case "more_kind":
                return f"the {more} picture shows more {kind.plural} than the {less} picture"
            case "more":
                return f"the {more} picture shows more objects than the {less} picture"
            case _:
                return "both pictures show the same number of objects"

    def truth(self, left: Content, right: Content) -> bool:
        """Whether the statement is true of the two images."""
        counts = left.count(self.kind), right.count(self.kind)
        totals = left.total, right.total
        match self.template:
            case "both":
                return all(counts)
            case "exactly_one":
                return (counts[0] > 0) != (counts[1] > 0)
            case "neither":
                return not any(counts)
            case "in_all":
                return sum(counts) == self.number
            case "more_kind":
                return counts[self.side] > counts[1 - self.side]
            case "more":
                return totals[self.side] > totals[1 - self.side]
            case _:
                return totals[0] == totals[1]


class JudgedStatement(NamedTuple):
    """A statement in words, its template, and "true" or "false" for some pair of scenes."""

    kind: str
    text: str
    answer: str


def nlvr2(left: Scene, right: Scene) -> tuple[JudgedStatement, ...]:
    """Every statement of the language, judged by the two scenes."""
    kinds = range(len(KINDS))
    every = [Statement(template, kind) for template in ("both", "exactly_one", "neither") for kind in kinds]
    every += [Statement("in_all", kind, number) for kind in kinds for number in range(2, MOST + 1)]
    every += [Statement("more_kind", kind, 0, side) for kind in kinds for side in (0, 1)]
    every += [Statement("more", 0, 0, 0), Statement("more", 0, 0, 1), Statement("same")]
    return tuple(JudgedStatement(s.template, s.text, TRUTHS[s.truth(left.content, right.content)]) for s in every)


def draw_statement(stock: Stock, draws: Draws) -> tuple[Statement, Content, Content]:
    """A statement and two contents to judge it by: the text, then whether it is true, then contents that make it so."""
    kind = draws.below(len(KINDS))
    statement = Statement(draws.pick(STATEMENT_TEMPLATES), kind, draws.between(2, MOST), draws.below(2))
    wanted = draws.chance(0.5)
    while True:
        left, right = (arrange(groups, draws) for groups in _draw_groups(statement, stock, draws))
        if statement.truth(left, right) == wanted:
            return statement, left, right


def _draw_groups(statement: Statement, stock: Stock, draws: Draws) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """Groups for two images, such that both truth values are likely."""
    if statement.template in ("more", "same"):
        return stock.any(draws), stock.any(draws)
    chance = 0.75 if statement.template in ("in_all", "more_kind") else 0.5
    first, second = (
        stock.with_kind(statement.kind, draws) if draws.chance(chance) else stock.without_kind(statement.kind, draws)
        for _ in range(2)
    )
    return first, second


def state(left: Content, right: Content, draws: Draws) -> Statement:
    """A random statement about two given contents, true or false equally often, and nearly so in each template."""
    wanted = draws.chance(0.5)
    seen = [group.kind for content in (left, right) for group in content.groups]
    while True:
        template = draws.pick(STATEMENT_TEMPLATES)
        chance_absent = 0.75 if template == "neither" and wanted else 0.3 if template in _ABOUT_PRESENCE else 0.1
        kind = draws.below(len(KINDS)) if draws.chance(chance_absent) else draws.pick(seen)
        statement = Statement(template, kind, draws.between(2, MOST), draws.below(2))
        if statement.truth(left, right) != wanted:
            continue
        if not wanted and template in _SELDOM_TRUE and draws.chance(_SELDOM_TRUE[template]):
            continue
        return statement


_ABOUT_PRESENCE = ("both", "exactly_one", "neither")
_SELDOM_TRUE: dict[str, float] = {"both": 0.5, "same": 0.6, "in_all": 0.6}
"""Share of false statements passed over in `state`, because few pairs of images make such a statement true."""


def related(stock: Stock, content: Content, draws: Draws) -> Content:
    """A content to pair with the given one, that shares a kind with it half of the time."""
    if draws.chance(0.5):
        return arrange(stock.with_kind(draws.pick(content.groups).kind, draws), draws)
    return arrange(stock.any(draws), draws)
