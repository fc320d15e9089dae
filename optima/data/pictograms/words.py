"""Every word of the data set's closed language, for the word-level vocabulary."""

from optima.data.pictograms.captions import NUMBERS, RELATIONS
from optima.data.pictograms.kinds import KINDS
from optima.data.pictograms.questions import PLACES
from optima.task import LABELS, TRUTHS

_GRAMMAR = """
    a all an are at both exactly how in is least many more neither number objects of one picture pictures right same
    show shows than the there to what where yes no
"""


def words() -> tuple[str, ...]:
    """All words that texts and answers are made of, in a fixed order: grammar first, then the nouns."""
    grammar = sorted({*_GRAMMAR.split(), *NUMBERS, *" ".join(RELATIONS).split(), *PLACES, *LABELS, *TRUTHS})
    nouns = [word for kind in KINDS for word in (kind.name, kind.plural)]
    return tuple(dict.fromkeys(grammar + nouns))
