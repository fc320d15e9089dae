"""VQA answers as the reference evaluator of the benchmark compares them, and the vocabulary built from them.

Two answers are equal if they are after: punctuation out, lower case, number words to digits, articles out, and the
apostrophes of contractions back in. The reference evaluator's own oddities are kept, since scores are compared with
published ones; each is named where it stands.
"""

import re
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Any comma between digits in a text makes all its punctuation vanish instead of becoming a space.
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
# The evaluator's look-behind is mistyped as a look-ahead, so a period goes wherever no digit follows it ...
_PERIOD = re.compile(r"\.(?!\d)")
# ... and re.UNICODE stands where the number of replacements belongs.
_MOST_PERIODS = int(re.UNICODE)
_COUNTING = "zero one two three four five six seven eight nine ten"
_NUMBERS = {
    "none": "0",
    **{word: str(i) for i, word in enumerate(_COUNTING.split())},
}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
# A contraction is recognised with exactly one of its apostrophes left out.
_MENDED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise_answer(answer: str) -> str:
    """The answer in the form in which the reference evaluator compares answers.

    The evaluator itself normalises only the answers of questions whose annotators disagree; that is the metric's
    business, not this function's.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    drop = _DIGITS_AROUND_COMMA.search(text) is not None
    bare = text
    for mark in _PUNCTUATION:
        alone = mark + " " in text or " " + mark in text
        bare = bare.replace(mark, "" if drop or alone else " ")
    bare = _PERIOD.sub("", bare, count=_MOST_PERIODS)
    words = [_NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def answer_vocabulary(answers: Iterable[str], size: int) -> tuple[str, ...]:
    """The `size` most frequent normalised answers, the most frequent first; ties stand in alphabetical order."""
    raw = Counter(answers)
    counts: Counter[str] = Counter()
    for answer, count in raw.items():
        counts[normalise_answer(answer)] += count
    del counts[""]
    ranked = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return tuple(ranked[:size])


def agreed_answer(answers: Iterable[str], vocabulary: dict[str, int]) -> int:
    """The class that most annotators gave, -1 if none of their answers is in the vocabulary; ties go to the lower."""
    votes = Counter(vocabulary[known] for answer in answers if (known := normalise_answer(answer)) in vocabulary)
    return min(votes, key=lambda target: (-votes[target], target)) if votes else -1
