"""A study: a suite that is no contest but tables of its own, and has a page of its own."""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """What is in it, with its numbers; a text a cell."""

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
