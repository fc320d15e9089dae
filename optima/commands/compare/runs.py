"""The runs of a comparison: one ordinary run directory a task, method and seed.

Each run is a process of its own, the same command a person would type, so its time and peak memory are its own and it
can be looked at or resumed alone.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from optima.commands.compare.methods import Options, option_words
from optima.commands.console import make_console, make_table
from optima.commands.distill_hf.config import DistillHfConfig
from optima.plain_yaml import load_yaml
from optima.report import formatting
from optima.report.comparison import (
    Outcome,
    conclusion,
    headings,
    markdown,
    method_rows,
    row_texts,
    write_comparison,
)
from optima.runs.config import DistillConfig
from optima.runs.directory import flat
from optima.runs.reading import CONFIG, SUMMARY, read_summary
from optima.runs.rows import parsed, plain, read
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError

ASKED, SETTINGS = "comparison.json", "settings.yaml"
"""Files of a comparison's directory: what was asked for, and the settings that all runs share."""


@dataclass(frozen=True)
class Asked:
    """comparison.json: the runs that a comparison is made of, where they are scored, and the command."""

    task: tuple[str, ...]
    method: tuple[str, ...]
    seeds: int
    split: str
    command: str = ""


@dataclass(frozen=True)
class Comparison:
    """A comparison to be made in the directory `run`.

    command: that of each run. settings: what all runs share. methods: in what the runs of each method differ from it.
    """

    run: Path
    asked: Asked
    command: str
    settings: DistillConfig | DistillHfConfig
    methods: Mapping[str, Options]
    jobs: int = 1


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    task: str
    method: str
    seed: int

    def path(self, root: Path) -> Path:
        return root / self.task / self.method / f"seed-{self.seed}"


def run_command(comparison: Comparison, cell: Cell) -> list[str]:
    """The command of one run; modules in the current folder do not take part (-P)."""
    path = cell.path(comparison.run)
    words = [sys.executable, "-P", "-m", "optima.run", comparison.command, "--config", str(comparison.run / SETTINGS)]
    if isinstance(comparison.settings, DistillConfig):
        words += ["--task", cell.task]
    words += ["--seed", str(cell.seed), "--run", str(path), "--quiet", "true"]
    words += option_words(comparison.methods[cell.method])
    return words + (["--resume", "true"] if (path / CONFIG).exists() else [])


def run_comparison(comparison: Comparison) -> None:
    """Runs what is missing, prints a table a task, and writes comparison.html and comparison.md."""
    _settle(comparison)
    run, asked = comparison.run, replace(comparison.asked, command="optima " + shlex.join(sys.argv[1:]))
    write_atomically(run / ASKED, json.dumps(plain(asked)).encode())
    _run_missing([cell for cell in _cells(asked) if not (cell.path(run) / SUMMARY).exists()], comparison)
    outcomes = [_outcome(cell, run, asked.split) for cell in _cells(asked)]
    text = f"{markdown(outcomes)}\n`{asked.command}`\n"
    write_atomically(run / "comparison.md", text.encode())
    _print(outcomes, run, draw_comparison(run))


def draw_comparison(run: Path, output: Path | None = None) -> Path:
    """Writes the page of a comparison's directory, comparison.html in it by default, of the runs that have finished.

    A task of which no run of optima has finished is left out. Raises OptimaError if that leaves nothing.
    """
    asked = read(Asked, parsed((run / ASKED).read_text(encoding="utf-8"), str(run / ASKED)), str(run / ASKED))
    finished = [cell for cell in _cells(asked) if (cell.path(run) / SUMMARY).exists()]
    tasks = {cell.task for cell in finished if cell.method == "optima"}
    outcomes = [_outcome(cell, run, asked.split) for cell in finished if cell.task in tasks]
    if not outcomes:
        raise OptimaError(f"no run of optima in {run} has finished, which the others are compared with")
    return write_comparison(outcomes, output or run / "comparison.html", command=asked.command)


def _cells(asked: Asked) -> list[Cell]:
    return [Cell(task, method, seed) for task in asked.task for seed in range(asked.seeds) for method in asked.method]


def _settle(comparison: Comparison) -> None:
    """Writes the shared settings, or refuses to mix two comparisons in one directory."""
    run, values = comparison.run, plain(comparison.settings)
    for name in ("task", "run", "seed", "quiet", "resume"):
        values.pop(name, None)
    path = run / SETTINGS
    if path.exists():
        before, now = (flat(found) for found in (load_yaml(path.read_text(encoding="utf-8"), str(path)), values))
        for name in sorted(before | now):
            if before.get(name) != now.get(name):
                raise OptimaError(
                    f"{run} holds runs with distill.{name} {before.get(name)}, now it is {now.get(name)}; "
                    "give the same settings, or a new directory with --run"
                )
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptimaError(f"cannot make the directory {run}: {error.strerror}; give another --run") from error
    if not all(path.name.endswith(".part") for path in run.iterdir()):  # of one that was killed at once
        raise OptimaError(f"directory {run} holds something, but no comparison; give another with --run")
    write_atomically(path, yaml.safe_dump(values, sort_keys=False).encode())


def _run_missing(cells: Sequence[Cell], comparison: Comparison) -> None:
    """Raises OptimaError naming the first run that failed; runs under way are stopped, and save themselves."""
    started = time.monotonic()
    # The pool waits for its threads, so the processes that they wait for must have been stopped before.
    with ThreadPoolExecutor(comparison.jobs) as pool, _processes(comparison) as start:
        pending = {pool.submit(start, cell): cell for cell in cells}
        try:
            for done, finished in enumerate(as_completed(pending), 1):
                cell = pending[finished]
                finished.result()
                outcome = _outcome(cell, comparison.run, comparison.asked.split)
                left = (time.monotonic() - started) / done * (len(cells) - done)
                print(
                    f"{done}/{len(cells)}  {cell.task}  {cell.method}  seed {cell.seed}: {outcome.said} in "
                    f"{outcome.seconds:.0f} s  {left / 60:.0f} min left",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _processes(comparison: Comparison) -> Iterator[Any]:
    """Yields a function that runs one cell to its end; leaving stops what still runs."""
    running: set[subprocess.Popen[str]] = set()
    stopped = False

    def run(cell: Cell) -> None:
        if stopped:
            return
        log = cell.path(comparison.run).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            process = subprocess.Popen(
                run_command(comparison, cell),
                stdout=file,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "COLUMNS": "100"},
            )
            running.add(process)
            _, errors = process.communicate()
            running.discard(process)
            file.write(errors)
        if process.returncode:
            said = errors.strip().splitlines()[-1] if errors.strip() else f"exit status {process.returncode}"
            raise OptimaError(f"{cell.task} {cell.method} seed {cell.seed} failed: {said} (all of it: {log})")

    try:
        yield run
    finally:
        stopped = True
        for process in list(running):
            process.terminate()


def _outcome(cell: Cell, root: Path, split: str) -> Outcome:
    summary, report = read_summary(cell.path(root) / SUMMARY), cell.path(root) / "report.html"
    metric, validation = summary.headline_metric, split == "validation"
    return Outcome(
        cell.task,
        cell.method,
        cell.seed,
        score=summary.learning_curve[-1][metric] if validation else summary.scores["after"][metric],
        seconds=summary.seconds,
        peak_mib=summary.peak_mib,
        report=report if report.exists() else None,
        loss=metric if summary.losses else "",
        scored_on="validation split" if validation else summary.scored_on,
    )


def _ends(task: str, run: Path) -> str:
    """What the student scored before distillation, and the teacher."""
    summary = read_summary(Cell(task, "optima", 0).path(run) / SUMMARY)
    before, teacher = (summary.scores[model][summary.headline_metric] for model in ("before", "teacher"))
    said = f"Student before {formatting.plain(before)}, teacher {formatting.plain(teacher)}"
    return f" {said} (seed 0, {summary.scored_on})."


def _print(outcomes: Sequence[Outcome], run: Path, page: Path) -> None:
    console = make_console()
    tasks = {outcome.task for outcome in outcomes}
    for task, rows in method_rows(outcomes).items():
        heads = headings(rows)
        table = make_table(*heads, title=f"{formatting.task_title(task)}, {outcomes[0].scored_on}")
        table.columns[heads.index("")].justify = "left"
        for row in row_texts(rows):
            table.add_row(*astuple(row))
        console.print(table)
        console.print(f"{conclusion(rows)}{_ends(task, run) if task in tasks else ''}")
    console.print(f"Comparison: {page}", soft_wrap=True)
