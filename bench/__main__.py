"""Ours beside everybody else's, in one command.

    python -m pip install -e '.[bench]' && python -m pip install --no-deps torchdistill==1.1.5
    python -m bench                                     # everything: about an hour on two cores
    python -m bench --only attention whole_step         # these suites
    python -m bench --only logits --no-growth --rounds 2
    python -m pytest bench --benchmark-only             # the same contests under pytest-benchmark

Prints one table of ratios, writes JSON into bench/results/<device>/ and renders bench/RESULTS.md from all of it; of a
tree with changes that are not committed it keeps nothing, since nobody could measure that again: --dry. Runs on a GPU
where there is one. Exit status 1: a contender that should equal ours did not.
"""

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import report
from bench.growth import grow
from bench.measure import failed, measure, own_memory
from bench.suites import SUITES, find


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=SUITES, default=list(SUITES), metavar="SUITE", help=f"{', '.join(SUITES)}"
    )
    parser.add_argument("--rounds", type=int, help="samples a contender, instead of each contest's own number")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--no-memory", action="store_true", help="leave out memory, which takes a process a contender")
    parser.add_argument("--no-growth", action="store_true", help="leave out the exponents")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where others use the machine")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure_memory:
        suite, name, contender = json.loads(options.measure_memory)
        print(json.dumps(own_memory(find(suite, name).contenders[contender]())))
        return 0
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device", file=sys.stderr)
        return 2
    return run(options, device)


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Measures the suites one after the other, and keeps every result as soon as it is there."""
    clock, memory, write = options.clock, not options.no_memory, not options.dry
    console = Console()
    console.width = max(console.width, 160)  # names are long, and a pipe says 80
    about = report.describe(device) | {"clock": clock}
    if write and about["commit"].endswith(report.DIRTY):
        print(
            f"python -m bench: {about['commit']} is no commit to measure again; commit first, or --dry", file=sys.stderr
        )
        return 2
    console.print(about)
    right = True
    table = Table(*report.HEADER, title=f"{about['device']}, torch {torch.__version__}")
    lines: list[str] = []
    exponents = Table(*report.GROWTH_HEADER)
    for suite in options.only:
        contests: list[Any] = []
        sweeps: list[Any] = []
        for contest in SUITES[suite].contests(device):
            console.print(f"{suite}: {contest.name}", style="dim")
            found = measure(contest, device, options.rounds, memory, clock)
            contests.append(found)
            for row in report.rows_of(found):
                table.add_row(*row)
            lines += report.bars_of(found)
            right &= not any(failed(row.get("note", "")) for row in found["rows"].values())
            _keep(write, suite, about, contests, sweeps)
        for sweep in SUITES[suite].sweeps(device) if not options.no_growth else []:
            console.print(f"{suite}: growth with {sweep.axis}, {sweep.name}", style="dim")
            sweeps.append(grow(sweep, device, memory=memory, clock=clock))
            for row in report.growth_of(sweeps[-1]):
                exponents.add_row(*row)
            _keep(write, suite, about, contests, sweeps)
    console.print(table)
    for line in lines:
        console.print(line)
    if exponents.row_count:
        console.print(exponents)
    if write:
        (report.ROOT / "bench" / "RESULTS.md").write_text(report.markdown())
        console.print(f"wrote {report.RESULTS}/ and bench/RESULTS.md")
    return 0 if right else 1


def _keep(write: bool, suite: str, about: dict[str, Any], contests: list[Any], sweeps: list[Any]) -> None:
    if write:
        report.write(suite, about, contests, sweeps)


if __name__ == "__main__":
    sys.exit(main())
