"""The committed table of what the gate found: a section for every Triton version it was run with."""

import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from optima_kernels.inspect.chips import CHIPS
from optima_kernels.inspect.fake_driver import Compiled
from optima_kernels.inspect.gate import Outcome
from optima_kernels.inspect.problems import problems

HEAD = """# What the compilers make of the kernels

Made without a GPU by `python -m optima_kernels.inspect.gate --write bench/AOT.md`, once with each Triton version: the
project's own launch code runs under a driver that is not there, and Triton compiles what a launch would. A row is a
kernel as it is compiled, with the first problem that launches it and how many do. Figures are those of the targets
that the section names, in that order. Registers and spilled bytes are a thread's, shared memory a block's; blocks are
those that fit on a multiprocessor at once. Programs: the fewest that it is launched on at the recipes' sizes; for
products they must be at least the multiprocessors, {multiprocessors} of {targets}.
C7515: ptxas's remark for sm_90 that wgmma instructions wait for one another. A product marked r takes its left factor
from registers there. Compiled code says what could be fast, not that it is.
"""

COLUMNS: tuple[str, ...] = ("first problem", "problems", "kernel", "warps", "stages", "registers", "spilled, B")
COLUMNS += ("shared, KiB", "blocks", "programs", "C7515", "faults")


@dataclass
class Row:
    """A kernel as it is compiled for every target."""

    problem: str
    kernel: str
    compiled: tuple[Compiled, ...]
    problems: set[str] = field(default_factory=set)
    programs: dict[str, int] = field(default_factory=dict)  # the fewest at the recipes' sizes, by target
    faults: set[str] = field(default_factory=set)

    def cells(self) -> list[str]:
        product = next((x for x in self.compiled if x.target == "sm_90"), None)
        remark = "" if product is None or not product.is_product else "yes" if product.serialised else "no"
        return [
            self.problem,
            str(len(self.problems)),
            self.kernel + (" (r)" if product is not None and product.left_in_registers else ""),
            _joined(x.warps for x in self.compiled),
            _joined(x.stages for x in self.compiled),
            _joined(x.registers for x in self.compiled),
            _joined(x.spilled for x in self.compiled),
            _joined(round(x.shared / 1024) for x in self.compiled),
            _joined(x.resident for x in self.compiled),
            _joined(self.programs[x.target] for x in self.compiled) if self.programs else "",
            remark,
            "; ".join(sorted(self.faults)),
        ]


def _joined(values: Iterator[int]) -> str:
    """One number where all are equal."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def write(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Puts the table of this Triton version into the file; tables of other versions stay."""
    import triton

    sections = _sections(path.read_text()) if path.exists() else {}
    sections[str(triton.__version__)] = section(outcomes)
    chips = [chip.multiprocessors for chip in CHIPS.values()]
    head = HEAD.format(targets=", ".join(CHIPS), multiprocessors=", ".join(map(str, chips)))
    bodies = [f"## Triton {version}\n\n{sections[version]}\n" for version in sorted(sections)]
    path.write_text("\n".join([head, *bodies]))


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## Triton (\S+)\n", text, flags=re.MULTILINE)
    return {version: body.strip() for version, body in zip(parts[1::2], parts[2::2], strict=True)}


def section(outcomes: Sequence[Outcome]) -> str:
    """How it was made, what could not be launched, and the rows."""
    rows = rows_of(outcomes)
    faults = sum(len(outcome.faults) for outcome in outcomes)
    asked, targets = {x.problem for x in outcomes}, ", ".join(dict.fromkeys(x.target for x in outcomes))
    counts = f"{len(asked)} problems on {targets}, {len(rows)} different kernels, {faults} faults"
    unlaunched: dict[str, list[str]] = {}
    for outcome in outcomes:
        for fault in outcome.faults if not outcome.launches else ():
            unlaunched.setdefault(f"{outcome.problem}: {fault}", []).append(outcome.target)
    refused = dict.fromkeys(f"{x.problem}: {x.refused}" for x in outcomes if x.refused and not x.faults)
    notes = [f"- {text} ({', '.join(places)})" for text, places in unlaunched.items()]
    notes += [f"- refused with an error, as it may be: {text}" for text in refused]
    head = [f"{_made()}; torch {torch.__version__}; {counts}.", "", *notes, *([""] if notes else [])]
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join([*head, *table, *("| " + " | ".join(row.cells()) + " |" for row in rows)])


def _made() -> str:
    """When, at which commit and on what machine."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return f"{datetime.now(UTC):%Y-%m-%d}, commit {found.stdout.strip() or 'unknown'}, {platform.machine()}"


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Different kernels in order of first appearance."""
    sized = {problem.name for problem in problems() if problem.fills_chip}
    rows: dict[tuple[str, tuple[Compiled, ...]], Row] = {}
    for name in dict.fromkeys(outcome.problem for outcome in outcomes):
        of_problem = [outcome for outcome in outcomes if outcome.problem == name]
        for kernel, compiled in _matched(of_problem):
            row = rows.setdefault((kernel, compiled), Row(name, kernel, compiled))
            row.problems.add(name)
            for outcome in of_problem:
                programs = [launch.programs for launch in outcome.launches if launch.compiled in compiled]
                if programs and name in sized:
                    row.programs[outcome.target] = min([*programs, row.programs.get(outcome.target, programs[0])])
                prefix = f"{kernel} "
                mine = (fault.removeprefix(prefix) for fault in outcome.faults if fault.startswith(prefix))
                row.faults.update(f"{outcome.target} {fault}" for fault in mine if programs)
    return list(rows.values())


def _matched(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, tuple[Compiled, ...]]]:
    """The n-th kernel of a name on one target belongs to the n-th of that name on the others."""
    by_name: dict[str, list[list[Compiled]]] = {}
    for place, outcome in enumerate(outcomes):
        for compiled in dict.fromkeys(launch.compiled for launch in outcome.launches):
            lists = by_name.setdefault(compiled.kernel, [[] for _ in outcomes])
            lists[place].append(compiled)
    for kernel, lists in by_name.items():
        for i in range(max(map(len, lists))):
            yield kernel, tuple(found[i] for found in lists if i < len(found))
