"""Captions into the words that COCO's metrics count, without Java.

COCO tokenises captions with Stanford's PTBTokenizer (CoreNLP 3.4.1, lower-cased) and drops punctuation. Here are its
rules for what captions hold: English words, contractions, possessives, abbreviations, numbers, times, prices, brackets
(kept as -lrb- and -rrb-, as COCO keeps them), quotes and emoticons. How often it cuts differently is measured in the
tests on captions that it tokenised itself.
"""

# ruff: noqa: SIM905 (word lists)

import re
from functools import lru_cache

DROPPED = frozenset(('"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Tokens that COCO leaves out; it means to leave out brackets, too, but looks for them in capitals."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201b", "'"), **dict.fromkeys("\u201c\u201d\u201e", '"'),
        **dict.fromkeys("\u2013\u2014\u2015", "--"), "\u2026": "...", "\u00a0": " ", "\u00ad": "",
        "\u00a3": "#", "\u20ac": "$", "\u00a2": "cents",
        "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
    }
)  # fmt: skip
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))
# Java's characters are 16 bits wide; the tokenizer drops the pairs that stand for others, emoji among them.
_BEYOND_16_BITS = re.compile("[\U00010000-\U0010ffff]+")
_SPACE, _NUMBER = "\ue000", "\ue001"
# "no." is an abbreviation before a number only.
_NUMBERED = re.compile(r"(?<![^\W_])(nos?\.)(?=\s?\d)", re.IGNORECASE)
_TELEPHONE = re.compile(r"(\(\d{2,3}\)) (\d{3,4}[-./]?\d{4})(?!\d)")

_WORD = r"[^\W_]+(?:_[^\W_]+)*"
_ABBREVIATIONS = (
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri inc corp co bros ltd "
    "plc mr mrs ms messrs dr drs prof sr jr st ste mt ft gov sen rep gen col capt cpt lt sgt maj pvt rev hon "
    "pres ave blvd rd bldg etc vs al approx dept dist est ext misc esp fig vol ph.d ed e.g i.e"
).split()
_SHORT = "|".join(re.escape(word) for word in sorted(_ABBREVIATIONS, key=len, reverse=True))
_APOSTROPHE_WORDS = (
    r"o'clock|c'mon|'n'|'em|'til|'till|'cause|'tis|'twas|ol'|s'mores|li'l|d'oh|nor'easter|ev'ry|e'er|cont'd|"
    r"'\d0s|[ldj]'[^\W\d_]+"
)
# At every place the longest match wins, among equals the first.
_RULES = tuple(
    re.compile(rule, 0 if name in ("capitals", "joined") else re.IGNORECASE)
    for name, rule in (
        ("apostrophe", rf"(?:{_APOSTROPHE_WORDS})(?![^\W_])"),
        ("joined", r"(?![Yy]')[A-Za-z]*[aeiouyAEIOUY]'(?![A-Z]+(?![A-Za-z]))[aeiouA-Z][^\W\d_]*"),
        ("apart", r"y'(?=[^\W\d_]{2})|'n'|'\d\d(?!\S)"),
        ("suffix", r"'(?:s|m|d|re|ve|ll)(?![^\W_])"),
        ("not", r"n't(?![^\W_])"),
        ("numbered", rf"nos?\.(?=[,;:{_NUMBER}])"),
        ("abbreviation", rf"(?:{_SHORT})\."),
        ("initials", r"[^\W\d_](?:\.[^\W\d_])*\."),
        ("capitals", r"[A-Z]+(?:&[A-Z]+)+"),
        ("number", r"[-+]?\d*(?:[.,:]\d+)+|[-+]?\d+"),
        ("word", rf"{_WORD}(?:-{_WORD})*(?:/{_WORD}(?:-{_WORD})*){{0,2}}"),
        ("date", r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
        ("mention", r"[@#][a-z_][a-z0-9_]*"),
        ("address", r"(?:https?://|www\.)[^\W_]+(?:[\w./?=&%#-]*[^\W_])?"),
        ("domain", r"(?:[^\W_]+[.-])*[^\W_]+\.(?:com|net|org|edu|gov|info|co\.uk)(?![^\W_])"),
        ("mail", r"[^\W_][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)+[^\s\"<>|().]+"),
        ("tag", r"</?[a-z][^<>\s]*>"),
        ("smiley", r"[:;=][-o']?[()dp](?![^\W_])|\^_\^"),
        ("telephone", rf"\(\d{{2,3}}\){_SPACE}?\d{{3,4}}[-./]?\d{{4}}"),
        ("dots", r"\.{3,5}"),
        ("marks", r"[!?]+"),
        ("dashes", r"-{2,}"),
        ("stars", r"\*+"),
        ("quote", r"``|''|[\"]"),
        ("mark", _NUMBER),
        ("other", r"\S"),
    )
)
_SPLIT = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "lemme": ("lem", "me"), "gimme": ("gim", "me"), "'tis": ("'t", "is"), "'twas": ("'t", "was"),
    "more'n": ("more", "'n"),
}  # fmt: skip

_AUXILIARIES = frozenset(
    "ai are ca could dare did do does had has have is may might must need ought sha should was were wo would".split()
)
_NOT = re.compile(r"n't(?![^\W_])", re.IGNORECASE)


def tokenize(caption: str) -> list[str]:
    """The words of a caption, lower-cased and without punctuation, as COCO's evaluation counts them."""
    text = _ENTITY.sub(lambda found: _ENTITIES[found[0]], caption).translate(_PLAIN)
    text = _TELEPHONE.sub(rf"\1{_SPACE}\2", _BEYOND_16_BITS.sub(" ", text))
    text = _NUMBERED.sub(rf"\1{_NUMBER}", text)
    return [token for run in text.split() for token in _tokens(run)]


@lru_cache(maxsize=1 << 16)
def _tokens(run: str) -> tuple[str, ...]:
    """The tokens of characters without a space between them."""
    found: list[str] = []
    place = 0
    while place < len(run):
        token = max((match[0] for rule in _RULES if (match := rule.match(run, place))), key=len)
        word = _before_not(run, place, token)
        place += len(word)
        lower = word.lower()
        found += _SPLIT.get(lower, "".join(_BRACKETS.get(letter, letter) for letter in lower).split(_SPACE))
    return tuple(token for token in found if token not in DROPPED and token.strip(f".-{_NUMBER}"))


def _before_not(run: str, place: int, token: str) -> str:
    """Gives the n of "don't" to its "n't", which is a word of its own after auxiliary verbs."""
    verb = token[:-1].lower() in _AUXILIARIES and token[-1] in "nN" and run.startswith("'", place + len(token))
    return token[:-1] if verb and _NOT.match(run, place + len(token) - 1) else token
