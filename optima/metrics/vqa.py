"""VQA accuracy as the benchmark's reference evaluator computes it (Antol et al., 2015; Goyal et al., 2017)."""

from collections.abc import Sequence

from optima.data.answers import normalise_answer


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """The score of an answer, 0 to 1: over the annotators, the mean of min(1, others who said the same / 3).

    Answers are normalised only where the annotators disagree; else they are compared as they stand.
    """
    said, *others = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *annotators))
    if len(set(others)) > 1:
        said, *others = (normalise_answer(text) for text in (said, *others))
    agreeing = others.count(said)
    return sum(min(1.0, (agreeing - (other == said)) / 3) for other in others) / len(others)
