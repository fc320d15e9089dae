"""What the loops of a compiled kernel execute, read from its machine code (SASS)."""

import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Of a warp: a scheduler makes four a clock.
CLOCKS_OF_AN_EXPONENTIAL = 8


class Instruction(NamedTuple):
    """Where it lies, its name with what modifies it, and its operands."""

    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes; None of another instruction."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.startswith("BRA") else None
        return None if found is None else int(found[1], 16)


@cache
def clocks_of_an_exponential(cubin: Path) -> float:
    """Clocks of a scheduler for the loop with the most exponentials, of such the shortest, over those of its 32 lanes.

    One for each instruction that the loop executes, and `CLOCKS_OF_AN_EXPONENTIAL`; 0 where no loop has any.
    """
    code = instructions(cubin)
    loops = []
    for last in code:
        if last.target is not None and last.target < last.address:
            body = [x for x in code if last.target <= x.address <= last.address]
            exps = sum(x.name.startswith("MUFU.EX2") for x in body)
            loops.append((-exps, executed(body) + CLOCKS_OF_AN_EXPONENTIAL * exps))
    most, clocks = min(loops, default=(0, 0))
    return clocks / (-32 * most) if most else 0.0


def instructions(cubin: Path) -> list[Instruction]:
    """In order."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code)
    return [Instruction(int(address, 16), name, operands) for address, name, operands in found]


def executed(body: Sequence[Instruction]) -> int:
    """How many instructions of a loop run but for those that a branch leaps over: what only tiles on an edge need."""
    count, leaped = 0, 0
    for instruction in body:
        if instruction.address >= leaped:
            count += 1
            target = instruction.target
            if target is not None and instruction.address < target <= body[-1].address:
                leaped = target
    return count
