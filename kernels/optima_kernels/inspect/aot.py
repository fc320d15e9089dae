"""What the compilers make of our kernels, for GPUs that this machine does not have.

    python -m optima_kernels.inspect.aot [--target sm_90 ...] [--kernel TEXT ...] [--json] [--check TABLE] [--write TABLE]

Triton needs no driver to compile. So every configuration that a family of kernels ships (its `shipped_kernels`) is
compiled here, and what decides its speed is read from the result: registers, spilled bytes, shared memory, the
occupancy that follows from those, the matrix instruction, the widths of accesses to global memory. That is no
measurement: it says that nothing stands in the way of a fast kernel, not that it is fast.

The committed table is bench/AOT.md; `--check` compares with it, and `--write` writes it anew. Exit status 1: a kernel
breaks a limit or differs from the table.
"""

import argparse
import importlib
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from optima_kernels import triton as families
from optima_kernels.shared.dispatch import HAS_TRITON, INTERPRETED


@dataclass(frozen=True)
class Chip:
    """What the blocks of a kernel share on one multiprocessor, or compute unit.

    Registers are counted for one lane and divided among the warps of a scheduler; memory is in bytes.
    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 instruction set
    architecture, and LLVM's "User Guide for AMDGPU Backend".
    """

    lanes: int
    schedulers: int
    registers: int
    register_step: int
    warps: int
    blocks: int
    shared: int
    shared_of_a_block: int
    shared_reserved: int
    matrix_instruction: str
    tensor_columns: int = 0


CHIPS = {
    "sm_80": Chip(32, 4, 512, 8, 64, 32, 164 * 1024, 163 * 1024, 1024, r"\bmma\.sync\S*"),
    "sm_90": Chip(32, 4, 512, 8, 64, 32, 228 * 1024, 227 * 1024, 1024, r"\bwgmma\.mma_async\S*"),
    "sm_100": Chip(32, 4, 512, 8, 64, 32, 228 * 1024, 227 * 1024, 1024, r"\btcgen05\.mma\S*", 512),
    "gfx942": Chip(64, 4, 512, 8, 32, 32, 64 * 1024, 64 * 1024, 0, r"\bv_s?mfmac?_\w+"),
}

COLUMNS: tuple[str, ...] = (
    "kernel",
    "target",
    "warps",
    "stages",
    "registers",
    "spilled, B",
    "shared, B",
    "blocks",
    "occupancy",
)
COLUMNS += ("matrix instruction", "loads, bits", "stores, bits")


@dataclass(frozen=True)
class Figures:
    """One compiled kernel.

    `registers` and `spilled` bytes are those of a thread, `shared` bytes those of a block, `blocks` how many fit on a
    multiprocessor at once, `occupancy` the share of its warps that they fill. `loads` and `stores` count instructions
    for global memory by their width in bits. `seconds` of processor time is what compiling took.
    """

    kernel: str
    target: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    blocks: int
    occupancy: float
    matrix_instruction: str
    loads: dict[int, int]
    stores: dict[int, int]
    seconds: float
    faults: tuple[str, ...]

    def cells(self) -> list[str]:
        """As `COLUMNS`: everything but the time, which differs from run to run."""
        numbers = (self.warps, self.stages, self.registers, self.spilled, self.shared, self.blocks)
        accesses = (" ".join(f"{width}x{count}" for width, count in x.items()) for x in (self.loads, self.stores))
        return [
            self.kernel,
            self.target,
            *map(str, numbers),
            f"{self.occupancy:.0%}",
            self.matrix_instruction or "-",
            *accesses,
        ]


def shipped_kernels(target: str) -> Iterator[Any]:
    """The `ShippedKernel`s of every family, as the modules of `optima_kernels.triton` list them."""
    for module in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        family = importlib.import_module(module.name)
        yield from getattr(family, "shipped_kernels", lambda target: [])(target)


def measure(kernel: Any, target: str) -> Figures:
    """Compiles a `ShippedKernel` for one of `CHIPS` and reads the result."""
    chip = CHIPS[target]
    start = _processor_seconds()
    compiled = kernel.compile(target)
    seconds = _processor_seconds() - start
    is_amd = "amdgcn" in compiled.asm
    code = compiled.asm["amdgcn" if is_amd else "ptx"]
    registers, spilled = _amd_registers(code) if is_amd else _nvidia_registers(compiled.asm["cubin"])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    blocks = _blocks(chip, registers, shared, warps, getattr(compiled.metadata, "tmem_size", 0))
    instruction = re.search(chip.matrix_instruction, code)
    loads, stores = _amd_accesses(code) if is_amd else _nvidia_accesses(code)
    faults = {
        f"spills {spilled} bytes a thread": spilled > 0,
        f"{shared} bytes of shared memory a block, {chip.shared_of_a_block} at most": shared > chip.shared_of_a_block,
        "not one block fits on a multiprocessor": blocks == 0,
        "no matrix instruction": kernel.uses_dot and instruction is None,
    }
    return Figures(
        kernel=kernel.name,
        target=target,
        warps=warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        spilled=spilled,
        shared=shared,
        blocks=blocks,
        occupancy=blocks * warps / chip.warps,
        matrix_instruction=instruction.group().split(".sync")[0].split(".cta_group")[0] if instruction else "",
        loads=loads,
        stores=stores,
        seconds=seconds,
        faults=tuple(fault for fault, holds in faults.items() if holds),
    )


def differences(figures: Sequence[Figures], table: str) -> list[str]:
    """What `figures` say otherwise than `table`, the text of a table that `--write` wrote."""
    committed = {(cells[0], cells[1]): cells for cells in map(_cells_of, table.splitlines()) if len(cells) > 1}
    found = []
    for row in figures:
        before = committed.get((row.kernel, row.target))
        if before is None:
            found.append(f"{row.kernel}, {row.target}: not in the table")
            continue
        changes = zip(COLUMNS, before, row.cells(), strict=True)
        found += [f"{row.kernel}, {row.target}: {name} {a} -> {b}" for name, a, b in changes if a != b]
    return found


def markdown(figures: Sequence[Figures]) -> str:
    """The committed table."""
    import triton

    lines = [
        "# What the compilers make of the kernels",
        "",
        f"Made without a GPU by `python -m optima_kernels.inspect.aot --write bench/AOT.md` (torch {torch.__version__}, triton "
        f"{triton.__version__}). Registers and spilled bytes are a thread's, shared memory a block's; blocks are those "
        "that fit on a multiprocessor (compute unit) at once, occupancy the share of its warps that they fill. "
        "Accesses are instructions for global memory, width x number. Products of float32 have no matrix instruction "
        "on NVIDIA, where it would round them to tf32. Compiled code says what could be fast, not that it is.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in figures)]) + "\n"


def _processor_seconds() -> float:
    """Of this process and of the assemblers it has run: on a busy machine wall-clock time says little."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _nvidia_registers(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of its stack, where registers are spilled to."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return sizes["REG"], sizes["STACK"] + sizes["LOCAL"]


def _amd_registers(code: str) -> tuple[int, int]:
    """Vector registers of a lane, accumulators included, and its bytes of scratch memory."""
    sizes = {name: int(size) for name, size in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code)}
    return sizes["vgpr_count"], sizes["private_segment_fixed_size"]


def _blocks(chip: Chip, registers: int, shared: int, warps: int, tensor_columns: int) -> int:
    """How many blocks of `warps` warps a multiprocessor holds at once."""
    rounded = math.ceil(registers / chip.register_step) * chip.register_step
    by_registers = min(chip.registers // rounded * chip.schedulers, chip.warps) // warps
    limits = [chip.blocks, by_registers]
    if shared + chip.shared_reserved:
        limits.append(chip.shared // (shared + chip.shared_reserved))
    if tensor_columns:
        limits.append(chip.tensor_columns // tensor_columns)
    return min(limits)


def _nvidia_accesses(code: str) -> tuple[dict[int, int], dict[int, int]]:
    found = re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", code)
    accesses = {kind: [int(count or 1) * int(bits) for k, count, bits in found if k == kind] for kind in ("ld", "st")}
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)", code)
    return _counts(accesses["ld"] + [8 * int(size, 0) for size in copies]), _counts(accesses["st"])


def _amd_accesses(code: str) -> tuple[dict[int, int], dict[int, int]]:
    found = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)", code)
    bits = {"byte": 8, "short": 16, "dword": 32} | {f"dwordx{i}": 32 * i for i in (2, 3, 4)}
    loads, stores = ([bits[size] for kind, size in found if kind == wanted] for wanted in ("load", "store"))
    return _counts(loads), _counts(stores)


def _counts(widths: Iterable[int]) -> dict[int, int]:
    return dict(sorted(Counter(widths).items(), reverse=True))


def _print(figures: Iterator[Figures]) -> list[Figures]:
    """Prints each row as soon as it is there, since compiling all of them takes minutes."""
    rows = []
    widths = (52, 6, 5, 6, 9, 10, 9, 6, 9, 32, 18, 12)
    print("  ".join(f"{name:{width}}" for name, width in zip(COLUMNS, widths, strict=True)) + "  seconds")
    for row in figures:
        cells = zip(row.cells(), widths, strict=True)
        print("  ".join(f"{cell:{width}}" for cell, width in cells) + f"  {row.seconds:7.1f}", flush=True)
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m optima_kernels.inspect.aot", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", nargs="+", default=list(CHIPS), choices=CHIPS, help="GPUs; all if not given")
    parser.add_argument(
        "--kernel", nargs="+", default=[""], metavar="TEXT", help="only kernels with this in their name"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--cached", action="store_true", help="take what Triton's cache has; its times then say nothing"
    )
    parser.add_argument("--check", type=Path, metavar="TABLE", help="name what differs from this table")
    parser.add_argument("--write", type=Path, metavar="TABLE", help="write the table to this file")
    options = parser.parse_args(arguments)
    if not HAS_TRITON:
        parser.error("the triton package is not installed")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    from triton import knobs

    knobs.compilation.always_compile = not options.cached
    figures = (
        measure(kernel, target)
        for target in options.target
        for kernel in shipped_kernels(target)
        if any(text in kernel.name for text in options.kernel)
    )
    rows = list(figures) if options.json else _print(figures)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    problems = [f"{row.kernel}, {row.target}: {fault}" for row in rows for fault in row.faults]
    if options.check is not None:
        problems += differences(rows, options.check.read_text())
    if options.write is not None:
        options.write.write_text(markdown(rows))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
