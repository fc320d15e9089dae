"""Visual question answering: questions about what can be seen, with answers from a closed set.

| type           | wording                                  | answers                  |
|----------------|------------------------------------------|--------------------------|
| `what_in`      | what is in the picture (one group)       | a kind                   |
| `what_beside`  | what is to the left of the dogs          | a kind                   |
| `how_many`     | how many dogs are there (at least one is)| one, two, three, four    |
| `how_many_all` | how many objects are there               | one, two, three, four    |
| `where`        | where are the dogs (two groups)          | left, right, top, bottom |
| `is_there`     | is there a dog                           | yes, no                  |

No wording gives its answer away: `how_many` always says the plural, `what_beside` always says "is".
"""

from typing import NamedTuple

from optima.data.draws import Draws
from optima.data.pictograms.captions import NUMBERS, RELATIONS, relation_of
from optima.data.pictograms.combinations import MOST, Stock, arrange
from optima.data.pictograms.kinds import KINDS
from optima.data.pictograms.scene import Content, Group, Scene

PLACES = ("left", "right", "top", "bottom")
"""Answers to `where`, in the order of RELATIONS."""
ANSWERS: tuple[str, ...] = (*(kind.name for kind in KINDS), *NUMBERS[1:], *PLACES, "yes", "no")
"""The closed answer set; the index is the class."""
ANSWER_OF: dict[str, int] = {answer: number for number, answer in enumerate(ANSWERS)}
QUESTION_TYPES = ("what_in", "what_beside", "how_many", "how_many_all", "where", "is_there")


class Question(NamedTuple):
    """A question, its type, and its answer (one of ANSWERS)."""

    kind: str
    text: str
    answer: str


def vqa(scene: Scene) -> tuple[Question, ...]:
    """Every question that can be asked of the scene."""
    content = scene.content
    questions = [_how_many_all(content)]
    questions += [_how_many(group) for group in content.groups]
    questions += [_is_there(kind, content) for kind in range(len(KINDS))]
    if content.axis is None:
        questions.append(_what_in(content))
    else:
        questions += [_what_beside(content, asked) for asked in (0, 1)]
        questions += [_where(content, asked) for asked in (0, 1)]
    return tuple(questions)


def ask(content: Content, draws: Draws) -> Question:
    """A random question about a given content: type first, then its argument; yes and no are equally likely."""
    if content.axis is None:
        kind = draws.pick(("what_in", "how_many", "how_many_all", "is_there"))
    else:
        kind = draws.pick(("what_beside", "how_many", "how_many_all", "where", "is_there"))
    group = draws.below(len(content.groups))
    if kind == "what_in":
        return _what_in(content)
    if kind == "what_beside":
        return _what_beside(content, group)
    if kind == "how_many":
        return _how_many(content.groups[group])
    if kind == "how_many_all":
        return _how_many_all(content)
    if kind == "where":
        return _where(content, group)
    return _is_there(content.groups[group].kind if draws.chance(0.5) else absent_kind(content, draws), content)


def draw_question(stock: Stock, draws: Draws) -> tuple[Question, Content]:
    """A question and a content it is asked of: first the type, then the answer, then a content that has it."""
    kind = draws.pick(QUESTION_TYPES)
    if kind == "what_in":
        asked = draws.pick([number for number, counts in enumerate(stock.counts_alone) if counts])
        content = arrange((Group(asked, draws.pick(stock.counts_alone[asked])),), draws)
        return _what_in(content), content
    if kind == "how_many_all":
        wanted = draws.between(1, MOST)
        groups = stock.any(draws)
        while sum(group.count for group in groups) != wanted:
            groups = stock.any(draws)
        content = arrange(groups, draws)
        return _how_many_all(content), content
    if kind == "how_many":
        wanted = draws.between(1, MOST)
        asked = draws.pick([number for number in range(len(KINDS)) if stock.can_show(number, wanted)])
        content = arrange(stock.with_count(asked, wanted, draws), draws)
        return _how_many(Group(asked, wanted)), content
    asked = draws.below(len(KINDS))
    if kind == "is_there":
        present = draws.chance(0.5)
        content = arrange((stock.with_kind if present else stock.without_kind)(asked, draws), draws)
        return _is_there(asked, content), content
    content = arrange(stock.pair_with(asked, draws), draws)
    first = 0 if content.groups[0].kind == asked else 1
    return (_what_beside if kind == "what_beside" else _where)(content, first), content


def absent_kind(content: Content, draws: Draws) -> int:
    """A random kind that is not to be seen."""
    while True:
        kind = draws.below(len(KINDS))
        if all(group.kind != kind for group in content.groups):
            return kind


def _the(group: Group) -> str:
    kind = KINDS[group.kind]
    return f"the {kind.name if group.count == 1 else kind.plural}"


def _what_in(content: Content) -> Question:
    return Question("what_in", "what is in the picture", KINDS[content.groups[0].kind].name)


def _what_beside(content: Content, asked: int) -> Question:
    relation = RELATIONS[relation_of(content, asked)]
    text = f"what is {relation} {_the(content.groups[1 - asked])}"
    return Question("what_beside", text, KINDS[content.groups[asked].kind].name)


def _how_many(group: Group) -> Question:
    return Question("how_many", f"how many {KINDS[group.kind].plural} are there", NUMBERS[group.count])


def _how_many_all(content: Content) -> Question:
    return Question("how_many_all", "how many objects are there", NUMBERS[content.total])


def _where(content: Content, asked: int) -> Question:
    group = content.groups[asked]
    text = f"where {'is' if group.count == 1 else 'are'} {_the(group)}"
    return Question("where", text, PLACES[relation_of(content, asked)])


def _is_there(kind: int, content: Content) -> Question:
    return Question("is_there", f"is there {KINDS[kind].one}", "yes" if content.count(kind) else "no")
