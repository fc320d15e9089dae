"""Ways of choosing what to distil, from the same start at equal steps: `python -m bench.choosing`.

Each run is a line of a file, written when it has ended, and is not repeated; `--table FILE` prints the table. Other
options are those of `optima distill`, and hold for every method.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.balances import WEIGHINGS
from bench.lockstep import Lockstep, add_arguments
from optima.commands.compare.methods import METHODS, option_words
from optima.report.comparison import Outcome, markdown
from optima.runs.rows import plain
from optima_core import RoundRecord

_UNWEIGHED = ["--engine.balance", "none", "--engine.objective.hidden", "1", "--engine.objective.attention", "1"]


def run(task: str, seed: int, methods: Sequence[str], settings: argparse.Namespace) -> None:
    """Distils by each method, and writes each one's line."""
    lockstep = Lockstep(task, seed, settings)
    running = {
        method: lockstep.distiller(_UNWEIGHED, WEIGHINGS[method])
        if method in WEIGHINGS
        else lockstep.distiller(option_words(METHODS[method]))
        for method in methods
    }
    records: dict[str, list[RoundRecord]] = {method: [] for method in running}
    for _ in range(settings.rounds):
        for method, record in zip(running, lockstep.run_round(list(running.values())), strict=True):
            records[method].append(record)
    for method, distiller in running.items():
        score, seconds = lockstep.score(distiller), lockstep.seconds_of(distiller)
        row = {
            "task": task,
            "seed": seed,
            "method": method,
            "score": score,
            "seconds": seconds,
            "split": settings.split,
            "world": settings.world,
            "steps": settings.rounds * settings.steps,
            "options": settings.options,
            "rounds": [plain(record) for record in records[method]],
        }
        with open(settings.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{task}  seed {seed}  {method}: {score:.2f} % in {seconds:.0f} s", flush=True)


def table(path: Path, reference: str) -> str:
    """The runs of a file as Markdown."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    outcomes = [Outcome(row["task"], row["method"], row["seed"], row["score"], row["seconds"], 0.0) for row in rows]
    # One process ran them all: its memory says nothing of a method.
    return "\n".join(
        line.rsplit("|", 2)[0] + "|" if line.startswith("|") else line
        for line in markdown(outcomes, reference).splitlines()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *WEIGHINGS], default=[*METHODS, *WEIGHINGS])
    parser.add_argument("--out", type=Path, default=Path("choosing.jsonl"))
    settings, options = parser.parse_known_args()
    settings.options = options
    if settings.table:
        print(table(settings.table, "optima"))
        return
    done = set()
    if settings.out.exists():
        rows = map(json.loads, settings.out.read_text(encoding="utf-8").splitlines())
        done = {(row["task"], row["seed"], row["method"]) for row in rows}
    for seed in settings.seeds:
        for task in settings.tasks:
            methods = [method for method in settings.methods if (task, seed, method) not in done]
            if methods:
                run(task, seed, methods, settings)


if __name__ == "__main__":
    main()
