"""BLEU, ROUGE-L and CIDEr-D of captions against several references, as COCO's evaluation defines them.

Captions are lists of words, as `optima.metrics.ptb.tokenize` gives them. All functions take one candidate and at least
one reference an item, and return fractions (CIDEr-D: up to 10, as published numbers are ten times the mean cosine),
one an item, in float64.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]
ORDERS = 4
"""Longest n-grams that BLEU and CIDEr-D count."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a corpus and, for those that are means, of its items.

    bleu: BLEU-1 to BLEU-4 of the corpus, which are no means over items. rouge_l, cider_d: float64 [items].
    """

    bleu: tuple[float, ...]
    rouge_l: NDArray[np.float64]
    cider_d: NDArray[np.float64]


def caption_scores(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> CaptionScores:
    """All scores of a corpus.

    Raises ValueError if the numbers of candidates and reference sets differ, there is none, or a set is empty.
    """
    if len(candidates) != len(references) or not candidates:
        raise ValueError(f"one candidate an item is needed, got {len(candidates)} for {len(references)} items")
    if not all(references):
        raise ValueError("every item needs at least one reference")
    return CaptionScores(bleu(candidates, references), rouge_l(candidates, references), cider_d(candidates, references))


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, ...]:
    """BLEU-1..4 of a corpus (Papineni et al., 2002) with the closest reference length, the shorter of two as close."""
    matches, possible = np.zeros(ORDERS), np.zeros(ORDERS)
    length = reference_length = 0
    for said, truths in zip(candidates, references, strict=True):
        most: Grams = Counter()
        for truth in truths:
            most |= _grams(truth)
        for gram, count in _grams(said).items():
            matches[len(gram) - 1] += min(count, most[gram])
        possible += [max(0, len(said) - n) for n in range(ORDERS)]
        length += len(said)
        reference_length += min((abs(len(truth) - len(said)), len(truth)) for truth in truths)[1]
    # The reference evaluation keeps its quotients finite with these constants; they show in empty corpora only.
    precision = (matches + 1e-15) / (possible + 1e-9)
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    return tuple(float(np.prod(precision[:n]) ** (1 / n)) * brevity for n in range(1, ORDERS + 1))


def rouge_l(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2
) -> NDArray[np.float64]:
    """F-measure of the longest common subsequence (Lin, 2004): best precision and best recall over the references."""
    return np.array([_rouge_l(said, truths, beta) for said, truths in zip(candidates, references, strict=True)])


def cider_d(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0
) -> NDArray[np.float64]:
    """CIDEr-D (Vedantam et al., 2015): tf-idf cosine of clipped n-grams times a Gaussian of the length difference.

    Document frequencies are those of the references given, so that an item's score depends on the corpus.
    """
    counted = [[_grams(truth) for truth in truths] for truths in references]
    frequency = Counter(gram for grams in counted for gram in {gram for counts in grams for gram in counts})
    rarest = math.log(len(counted))
    scores = []
    for said, truths in zip(candidates, counted, strict=True):
        ours = _weigh(_grams(said), frequency, rarest)
        scores.append(sum(_similarity(ours, _weigh(truth, frequency, rarest), sigma) for truth in truths) / len(truths))
    return 10 * np.array(scores)


@dataclass(frozen=True)
class _Weighed:
    """tf-idf weights of the n-grams of a caption, their norm for each n, and the number of bigrams."""

    weights: dict[tuple[str, ...], float]
    norms: NDArray[np.float64]
    bigrams: int


def _grams(words: Words) -> Grams:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _weigh(counts: Grams, frequency: Counter[tuple[str, ...]], rarest: float) -> _Weighed:
    weights = {gram: count * (rarest - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}
    squares = np.zeros(ORDERS)
    for gram, weight in weights.items():
        squares[len(gram) - 1] += weight * weight
    return _Weighed(weights, np.sqrt(squares), sum(count for gram, count in counts.items() if len(gram) == 2))


def _similarity(said: _Weighed, truth: _Weighed, sigma: float) -> float:
    """The mean over n of the clipped cosines; lengths differ by bigrams, as in the reference evaluation."""
    dots = np.zeros(ORDERS)
    for gram, weight in said.weights.items():
        other = truth.weights.get(gram, 0.0)
        dots[len(gram) - 1] += min(weight, other) * other
    norms = said.norms * truth.norms
    cosines = np.divide(dots, norms, out=dots, where=norms > 0)
    return float(cosines.mean()) * math.exp(-((said.bigrams - truth.bigrams) ** 2) / (2 * sigma**2))


def _rouge_l(said: Words, truths: Sequence[Words], beta: float) -> float:
    common = [_common_subsequence(said, truth) for truth in truths]
    # An empty caption counts as one empty word, as splitting it at spaces gives.
    precision = max(common) / max(1, len(said))
    recall = max(length / max(1, len(truth)) for length, truth in zip(common, truths, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _common_subsequence(left: Words, right: Words) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for i, other in enumerate(right, 1):
            diagonal, row[i] = row[i], diagonal + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]
