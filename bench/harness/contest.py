"""A contest: contenders that do the same work, first checked equal, then measured beside one another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Run = Callable[[], Sequence[Tensor]]
"""Does the work once and returns what contenders must agree in."""

Quantity = Literal["time", "extra", "peak"]


class Unavailable(Exception):
    """A contender cannot run here, or computes something else; the text says why."""


class Bar(NamedTuple):
    """`contender` is to need at most this share of what `against` needs: time, extra memory or the process's peak."""

    contender: str
    against: str
    quantity: Quantity
    at_most: float


class Work(NamedTuple):
    """What the definition asks for: a multiply-add is two; every input is read and every gradient written once."""

    flops: float
    exps: float
    bytes: float


@dataclass(frozen=True)
class Contest:
    """Contenders by name; the first is the one that ratios refer to.

    Attributes:
        suite: The file of bench/suites/ that it comes from.
        name: What is done, with its sizes.
        contenders: Name -> a function that makes the inputs and returns the `Run`. It raises `Unavailable` where a
            package is missing.
        unequal: Contenders that do other work on purpose and are not compared.
        tolerance: Largest relative difference of a returned tensor from the first contender's.
        rounds: How often each is timed; they take turns.
        memory: Whether memory says anything here.
        bars: What is asked for, on a CPU.
        work: For the rates that are reached.
    """

    suite: str
    name: str
    contenders: Mapping[str, Callable[[], Run]]
    unequal: tuple[str, ...] = ()
    tolerance: float = 1e-4
    rounds: int = 5
    memory: bool = True
    bars: tuple[Bar, ...] = ()
    work: Work | None = None


class Sweep(NamedTuple):
    """The same contest at growing sizes, for the exponents of time and memory.

    contest: size -> the contest; of it, `contenders` are measured, of which the last few may stop at `most`.
    """

    suite: str
    name: str
    axis: str
    sizes: tuple[int, ...]
    contest: Callable[[int], Contest]
    contenders: tuple[str, ...] = ("eager", "optima")
    most: Mapping[str, int] | None = None
