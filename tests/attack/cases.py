"""A case of the corpus: how to make the thing, who reads it, and what must be said of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

Outcome = Literal["accepted", "rejected", "refused"]


class Verdict(NamedTuple):
    """What becomes of a thing.

    outcome: "accepted" as it is; "rejected": an item is lost, named with its kind, and the rest is used; "refused":
    the command ends in one line.
    words: of a rejection the kinds of what is lost, in alphabetical order; of a refusal a part of the line. In what a
        case expects they are a regular expression.
    """

    outcome: Outcome
    words: str = ""


ACCEPTED = Verdict("accepted")


@dataclass(frozen=True)
class Case:
    """One kind of hostile, broken or odd thing.

    Attributes:
        reader: Who reads it, a name of `judge.READERS`.
        name: What is odd about it.
        make: Writes it at the path, or makes a folder there; all that is arbitrary comes from the random numbers.
        verdict: What must become of it.
        file: Name of the file or folder, by whose ending some readers go.
    """

    reader: str
    name: str
    make: Callable[[Path, Random], None]
    verdict: Verdict
    file: str = "thing"

    def __str__(self) -> str:
        return f"{self.reader}: {self.name}"


def written(data: bytes | Callable[[Random], bytes]) -> Callable[[Path, Random], None]:
    """A maker that writes these bytes, or those that are made of the random numbers."""

    def make(path: Path, draws: Random) -> None:
        path.write_bytes(data if isinstance(data, bytes) else data(draws))

    return make
