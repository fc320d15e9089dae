"""What the compilers make of the kernels for GPUs that are not here, and whether anything stands in their way.

    python -m optima_kernels.inspect.gate [--target sm_90 ...] [--only TEXT ...] [--sample] [--write bench/AOT.md]

Every problem of `inspect.problems` goes through the project's own launch code under a driver that is not there
(`inspect.fake_driver`), so that Triton compiles what a launch would. Exit status 1, with names, where a kernel spills
registers, takes more shared memory than a block may, has its wgmma serialised (ptxas remark C7515) or in more than one
warp group, is launched on a grid beyond CUDA's limits, or multiplies matrices with fewer programs than the GPU has
multiprocessors at a size of the recipes; where a loss cannot be launched at all; and where the host would wait for the
GPU.

`--sample` takes the few problems that stand for all; `--write` puts the table of this Triton version into the file,
beside those of other versions. No fault here does not make a kernel fast: it says that nothing in its way was found.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from optima_kernels.inspect.chips import CHIPS, GRID_LIMITS
from optima_kernels.inspect.fake_driver import Launch, launches_on
from optima_kernels.inspect.problems import Problem, problems

# A wgmma instruction is a warp group's. Triton's wait for one does not reach across groups: one may overwrite what the
# other still reads.
WARPS_OF_A_GROUP = 4


@dataclass(frozen=True)
class Outcome:
    """What a problem launches on a target, different kernels in order and how many launches in all, and its faults."""

    problem: str
    target: str
    launches: tuple[Launch, ...]
    launched: int
    refused: str
    faults: tuple[str, ...]


def examine(problem: Problem, target: str) -> Outcome:
    """Compiles what the problem launches on the target and looks for faults."""
    refused, faults = "", []
    with launches_on(target) as log:
        try:
            problem.run()
        except ValueError as answer:
            refused = _line(answer)
            if not problem.may_refuse:
                faults.append(f"cannot be launched: {refused}")
        except Exception as failure:  # compilers fail in ways of their own
            faults.append(f"cannot be launched: {type(failure).__name__}: {_line(failure)}")
    for launch in dict.fromkeys(log.launches):
        faults += [f"{launch.compiled.kernel} {fault}" for fault in faults_of(launch, problem.fills_chip)]
    if log.host_reads:
        faults.append(f"the host waits for the GPU: {log.host_reads[0]}")
    different = tuple({(x.compiled, x.grid): x for x in log.launches}.values())
    return Outcome(problem.name, target, different, len(log.launches), refused, tuple(dict.fromkeys(faults)))


def faults_of(launch: Launch, fills_chip: bool) -> Iterator[str]:
    """What is wrong with one launch."""
    compiled, chip = launch.compiled, CHIPS[launch.compiled.target]
    if compiled.spilled:
        yield f"spills {compiled.spilled} bytes a thread"
    if compiled.shared > chip.shared_of_a_block:
        yield f"takes {compiled.shared} bytes of shared memory a block, {chip.shared_of_a_block} at most"
    if compiled.tensor_columns > chip.tensor_columns:
        yield f"takes {compiled.tensor_columns} columns of tensor memory, {chip.tensor_columns} at most"
    if compiled.warps > WARPS_OF_A_GROUP and "wgmma" in compiled.matrix_instruction:
        yield f"multiplies by wgmma in {compiled.warps} warps, whose groups Triton does not have wait for one another"
    if compiled.serialised:
        yield "has its wgmma instructions serialised (ptxas C7515)"
    for axis, size, most in zip("xyz", launch.grid, GRID_LIMITS, strict=True):
        if size > most:
            yield f"is launched on {size} programs along {axis}, {most} at most"
    if fills_chip and compiled.is_product and launch.programs < chip.multiprocessors:
        yield f"multiplies matrices in {launch.programs} programs, on {chip.multiprocessors} multiprocessors"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def gate(chosen: Sequence[Problem], targets: Sequence[str], jobs: int, tell: Callable[[str], None]) -> list[Outcome]:
    """`examine` of every problem on every target, problems of one target in one process."""
    outcomes: list[Outcome] = []
    if jobs == 1:
        for target in targets:
            outcomes += _examine_all([problem.name for problem in chosen], target, tell)
        return outcomes
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        work = partial(_examine_all, [problem.name for problem in chosen])
        for found in pool.map(work, targets):
            for outcome in found:
                tell(_told(outcome))
            outcomes += found
    return outcomes


def _examine_all(names: Sequence[str], target: str, tell: Callable[[str], None] | None = None) -> list[Outcome]:
    """Problems go by name, since what they call cannot be sent to another process."""
    found = []
    for problem in problems():
        if problem.name in names:
            found.append(examine(problem, target))
            if tell is not None:
                tell(_told(found[-1]))
    return found


def _told(outcome: Outcome) -> str:
    kernels = ", ".join(dict.fromkeys(launch.compiled.kernel for launch in outcome.launches))
    lines = [f"{outcome.target:7} {outcome.problem}: {outcome.launched} launches ({kernels})"]
    lines += [f"{'':8}FAULT {fault}" for fault in outcome.faults]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    description = __doc__.split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m optima_kernels.inspect.gate", description=description)
    parser.add_argument("--target", nargs="+", default=list(CHIPS), choices=CHIPS, help="GPUs; all if not given")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="problems with this in their name")
    parser.add_argument("--sample", action="store_true", help="only the few problems that stand for all")
    parser.add_argument("--jobs", type=int, default=1, help="processes; a target is done by one")
    parser.add_argument("--write", type=Path, metavar="TABLE", help="write this Triton version's table to the file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    started = time.monotonic()
    offered = [problem for problem in problems() if problem.sample or not options.sample]
    chosen = [problem for problem in offered if any(text in problem.name for text in options.only)]
    outcomes = gate(chosen, options.target, options.jobs, partial(print, flush=True))
    if options.write is not None:
        from optima_kernels.inspect.table import write

        write(options.write, outcomes)
    faults = [f"{x.problem}, {x.target}: {fault}" for x in outcomes for fault in x.faults]
    print(f"{len(outcomes)} problems, {len(faults)} faults, {time.monotonic() - started:.0f} s")
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
