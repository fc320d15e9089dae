"""Ours beside everybody else's, in one command.

    python -m pip install -e '.[bench]' && python -m pip install --no-deps torchdistill==1.1.5
    python -m bench                                     # every contest: about an hour on two cores
    python -m bench --only attention whole_step         # these suites
    python -m bench --only logits --no-growth --rounds 2
    python -m bench --only starts                       # a study, when asked for
    python -m pytest bench --benchmark-only             # the contests under pytest-benchmark

A contest's contenders are checked to be equal, then measured beside one another; a study makes tables of its own.
Prints them, writes JSON into bench/results/<device>/, and renders bench/RESULTS.md, or the study's page; of a tree with
changes that are not committed it keeps nothing, since nobody could measure that again: --dry. Runs on a GPU where there
is one. Exit status 1: a contender that should equal ours did not.

bench/run_on_gpu.py measures more on a rented GPU, from a plain checkout, and renders bench/GPU.md.
"""

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import report
from bench.harness.growth import grow
from bench.harness.measure import ROOT, failed, measure, own_memory
from bench.suites import CONTESTS, STUDIES, find, suite


def main() -> int:
    known = CONTESTS | STUDIES
    named = "; ".join(f"{name}: {what}" for name, what in known.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=known, default=list(CONTESTS), metavar="SUITE", help=named)
    parser.add_argument(
        "--rounds", type=int, help="samples a contender, or seeds of a study, in place of its own number"
    )
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
        name, contest, contender = json.loads(options.measure_memory)
        print(json.dumps(own_memory(find(name, contest).contenders[contender]())))
        return 0
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device", file=sys.stderr)
        return 2
    console = Console()
    console.width = max(console.width, 160)  # names are long, and a pipe says 80
    about = report.describe(device) | {"clock": options.clock}
    if not options.dry and about["commit"].endswith(report.DIRTY):
        print(
            f"python -m bench: {about['commit']} is no commit to measure again; commit first, or --dry", file=sys.stderr
        )
        return 2
    console.print(about)
    for name in options.only:
        if name in STUDIES:
            study(name, options, about, console)
    contests = [name for name in options.only if name in CONTESTS]
    return compete(contests, options, device, about, console) if contests else 0


def study(name: str, options: argparse.Namespace, about: dict[str, Any], console: Console) -> None:
    """Makes a study's tables and its page."""
    module = suite(name)
    tables = list(module.tables(options.rounds))
    for table in tables:
        shown = Table(*table.header, title=table.name)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    if not options.dry:
        report.write(name, about, tables=tables)
        page = ROOT / "bench" / module.PAGE
        before = page.read_text() if page.exists() else ""
        page.write_text(report.study_page(module, name, about, tables, before))
        console.print(f"wrote {page}")


def compete(
    names: list[str], options: argparse.Namespace, device: torch.device, about: dict[str, Any], console: Console
) -> int:
    """Measures contests one after the other, and keeps every result as soon as it is there."""
    clock, memory, write = options.clock, not options.no_memory, not options.dry
    right = True
    table = Table(*report.HEADER, title=f"{about['device']}, torch {torch.__version__}")
    lines: list[str] = []
    exponents = Table(*report.GROWTH_HEADER)
    for name in names:
        contests: list[Any] = []
        sweeps: list[Any] = []
        for contest in suite(name).contests(device):
            console.print(f"{name}: {contest.name}", style="dim")
            found = measure(contest, device, options.rounds, memory, clock)
            contests.append(found)
            for row in report.rows_of(found):
                table.add_row(*row)
            lines += [*report.bars_of(found), *report.ahead_of(found)]
            right &= not any(failed(row.get("note", "")) for row in found["rows"].values())
            if write:
                report.write(name, about, contests=contests, growth=sweeps)
        for sweep in suite(name).sweeps(device) if not options.no_growth else []:
            console.print(f"{name}: growth with {sweep.axis}, {sweep.name}", style="dim")
            sweeps.append(grow(sweep, device, memory=memory, clock=clock))
            for row in report.growth_of(sweeps[-1]):
                exponents.add_row(*row)
            if write:
                report.write(name, about, contests=contests, growth=sweeps)
    console.print(table)
    for line in lines:
        console.print(line)
    if exponents.row_count:
        console.print(exponents)
    if write:
        (ROOT / "bench" / "RESULTS.md").write_text(report.markdown())
        console.print(f"wrote {report.RESULTS}/ and bench/RESULTS.md")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
