"""The words of a data set's texts: a vocabulary made of them, and which of them a vocabulary lacks."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from optima.data.tokenizer import END, PAD, START, UNKNOWN, Tokenizer, split_words, tokenizer_of_words

MOST_WORDS = 8192
"""Words of a vocabulary that is made of texts, the most frequent ones: more would outweigh the rest of a student."""

MOST_TOKENS = 64
"""Tokens of a row whose length is that of the longest text; longer texts are cut."""

MOST_TEXTS = 2**20
"""Records whose texts a vocabulary is made of; of more, as many at even distances."""


def text_tokenizer(texts: Iterable[str]) -> tuple[Tokenizer, int]:
    """A word-level tokenizer of the texts' own words, and the tokens of their longest row, start and end included.

    Words come by frequency, then by the alphabet, so that the same texts in any order give the same ids.
    """
    counts: Counter[str] = Counter()
    longest = 1
    for text in texts:
        words = split_words(text)
        counts.update(words)
        longest = max(longest, len(words))
    special = (PAD, START, END, UNKNOWN)
    kept = sorted(counts.keys() - set(special), key=lambda word: (-counts[word], word))[:MOST_WORDS]
    vocabulary = {word: number for number, word in enumerate((*special, *kept))}
    return tokenizer_of_words(vocabulary), min(longest + 2, MOST_TOKENS)


@dataclass(frozen=True)
class UnknownWords:
    """What a vocabulary lacks of some texts.

    different: different words, most frequent first. known: how many different words it has. share: of all words of the
    texts, each counted as often as it stands there, those that are lacking, 0 to 1.
    """

    different: tuple[str, ...]
    known: int
    share: float

    def __str__(self) -> str:
        named = ", ".join(f"{word:.40}" for word in self.different[:5])
        total = len(self.different) + self.known
        return (
            f"{len(self.different)} of {total} different words, {100 * self.share:.1f} % of all, are not in the "
            f"vocabulary and read as unknown: {named}{', ...' if len(self.different) > 5 else ''}"
        )


def unknown_words(tokenizer: Tokenizer, texts: Iterable[str]) -> UnknownWords:
    """The words of the texts that a word-level tokenizer lacks; others cut words into pieces, and lack none."""
    if not tokenizer.words():
        return UnknownWords((), 0, 0.0)
    counts = Counter(word for text in texts for word in split_words(text))
    unknown = tokenizer.unknown(list(counts))
    lost = sum(counts[word] for word in unknown)
    different = tuple(sorted(unknown, key=lambda word: (-counts[word], word)))
    return UnknownWords(different, len(counts) - len(unknown), lost / max(1, counts.total()))
