"""Which groups there are, in order of importance, and how long each may take. Imports nothing that takes time."""

from dataclasses import dataclass

PARTS = ("correctness", "kernels", "step", "data")


@dataclass(frozen=True)
class Group:
    """Items that share a process.

    seconds: after which no further item is started; half as much again, and the process is ended.
    together: may run beside other groups, since it measures no time.
    tool: a program that the process runs under.
    package: of the module that is named after the part and has the group.
    """

    part: str
    name: str
    seconds: float
    together: bool = False
    tool: tuple[str, ...] = ()
    package: str = "bench.gpu."


def _sanitizer(tool: str) -> tuple[str, ...]:
    return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--print-limit", "5")


GROUPS = (
    Group("correctness", "about", 20, together=True),
    Group("correctness", "tests-engine", 120, together=True),
    Group("correctness", "attention", 60, together=True),
    Group("correctness", "linear", 60, together=True),
    Group("correctness", "hidden", 60, together=True),
    Group("correctness", "bits", 60, together=True),
    Group("correctness", "chunks", 50, together=True),
    Group("correctness", "autocast", 50, together=True),
    Group("correctness", "graphs", 50, together=True),
    Group("correctness", "attention-more", 60, together=True),
    Group("correctness", "linear-more", 60, together=True),
    Group("correctness", "strategies-attention", 60, together=True),
    Group("correctness", "strategies-hidden", 60, together=True),
    Group("correctness", "strategies-linear", 60, together=True),
    Group("correctness", "sanitized", 60, together=True, tool=_sanitizer("memcheck")),
    Group("correctness", "raced", 60, together=True, tool=_sanitizer("racecheck")),
    Group("correctness", "selfcheck", 60, together=True),
    Group("correctness", "tests-losses", 90, together=True),
    Group("kernels", "ceilings", 15),
    Group("kernels", "linear", 45),
    Group("kernels", "attention", 45),
    Group("kernels", "hidden", 30),
    Group("kernels", "attention-masks", 30),
    Group("kernels", "linear-large", 45),
    Group("step", "towers", 120),
    Group("data", "loaders", 120),
)


def groups_of(part: str) -> list[Group]:
    return [group for group in GROUPS if group.part == part]
