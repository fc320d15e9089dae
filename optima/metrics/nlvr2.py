"""NLVR2's consistency (Suhr et al., 2019)."""

from collections.abc import Sequence


def consistency(correct: Sequence[bool], identifiers: Sequence[str]) -> float:
    """Share, 0 to 1, of the statements that were judged rightly for every pair of images they were shown with.

    identifiers: `split-set-pair-sentence`; items that differ in nothing but the pair are of one statement.

    Raises ValueError for an identifier of another form.
    """
    all_right: dict[str, bool] = {}
    for good, identifier in zip(correct, identifiers, strict=True):
        parts = identifier.split("-")
        if len(parts) != 4:
            raise ValueError(f"identifier must be split-set-pair-sentence, got {identifier!r}")
        statement = "-".join((parts[0], parts[1], parts[3]))
        all_right[statement] = all_right.get(statement, True) and good
    return sum(all_right.values()) / len(all_right)
