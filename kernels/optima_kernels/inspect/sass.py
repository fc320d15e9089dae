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
def loop_of_exponentials(cubin: Path) -> list[Instruction]:
    """What the loop with the most exponentials executes, of such the shortest; nothing where no loop has any.

    If any of them loads into shared memory ahead, only those that do: others are beside the way.
    """
    code = instructions(cubin)
    loops = []
    for last in code:
        if last.target is not None and last.target < last.address:
            body = executed([x for x in code if last.target <= x.address <= last.address])
            if exponentials(body):
                ahead = any(x.name.startswith("LDGSTS") for x in body)
                loops.append((not ahead, -exponentials(body), len(body), body))
    return min(loops, key=lambda loop: loop[:3], default=(True, 0, 0, []))[3]


def clocks_of_an_exponential(cubin: Path) -> float:
    """Clocks of a scheduler for `loop_of_exponentials`, over the exponentials of its 32 lanes; 0 where there is none.

    One for each instruction that the loop executes, and `CLOCKS_OF_AN_EXPONENTIAL`.
    """
    body = loop_of_exponentials(cubin)
    exps = exponentials(body)
    return (len(body) / exps + CLOCKS_OF_AN_EXPONENTIAL) / 32 if exps else 0.0


def exponentials(body: Sequence[Instruction]) -> int:
    """How many of these there are."""
    return sum(x.name.startswith("MUFU.EX2") for x in body)


def instructions(cubin: Path) -> list[Instruction]:
    """In order."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code)
    return [Instruction(int(address, 16), name, operands) for address, name, operands in found]


def executed(body: Sequence[Instruction]) -> list[Instruction]:
    """The instructions of a loop but for those that a branch leaps over: what only tiles on an edge need."""
    found, leaped = [], 0
    for instruction in body:
        if instruction.address >= leaped:
            found.append(instruction)
            target = instruction.target
            if target is not None and instruction.address < target <= body[-1].address:
                leaped = target
    return found
