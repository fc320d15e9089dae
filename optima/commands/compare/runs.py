"""Whether the bandit is worth it: ways of choosing what to distil, at equal steps, from the same start, over seeds.

A comparison is a directory with one ordinary run directory a task, method and seed. Each run is a process of its own,
the same command a person would type, so its time and peak memory are its own and it can be looked at or resumed alone.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from optima.coca import MODULES
from optima.commands.console import make_console, make_table
from optima.commands.options import CompareConfig
from optima.data.records import FORMATS
from optima.plain_yaml import load_yaml
from optima.report.comparison import (
    HEADINGS,
    Outcome,
    conclusion,
    markdown,
    method_rows,
    row_texts,
    write_comparison,
)
from optima.report.formatting import task_title
from optima.runs.directory import flat
from optima.runs.reading import CONFIG, SUMMARY, read_summary
from optima.runs.rows import parsed, plain, read
from optima.task import TASKS, Task
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError

_NO_LAYERS = {"engine.objective.hidden": 0.0, "engine.objective.attention": 0.0}


def _policy(name: str, **options: float) -> dict[str, Any]:
    return {"engine.bandit.policy": name, "engine.bandit.options": options, "engine.bandit.arms": None}


def _at(weight: float) -> dict[str, Any]:
    return {"engine.balance": "none", "engine.objective.hidden": weight, "engine.objective.attention": weight}


def _subset(*modules: str) -> dict[str, Any]:
    arm = sum(1 << MODULES.index(module) for module in modules) - 1
    return _policy("fixed_arm", arm=arm) | {"engine.bandit.arms": "subsets"}


METHODS: dict[str, dict[str, Any]] = {
    "task_loss": {"engine.objective.logits": 0.0, **_NO_LAYERS},
    "task_loss_and_logits": _NO_LAYERS,
    **{f"all_modules_at_{weight}": _policy("all_modules") | _at(weight) for weight in (3, 10, 30, 100)},
    **{f"only_{module}": _policy("fixed_arm", arm=arm) for arm, module in enumerate(MODULES)},
    "image_and_text": _subset("image_encoder", "text_decoder"),
    "image_and_multimodal": _subset("image_encoder", "multimodal_decoder"),
    "image_and_multimodal_at_30": _subset("image_encoder", "multimodal_decoder") | _at(30),
    "text_and_multimodal": _subset("text_decoder", "multimodal_decoder"),
    "round_robin": _policy("round_robin"),
    "uniform": _policy("uniform"),
    "uniform_subset": _policy("uniform") | {"engine.bandit.arms": "subsets"},
    "discounted_ucb": _policy("discounted_ucb"),
    "discounted_thompson": _policy("discounted_thompson"),
    "linear_thompson": _policy("linear_thompson"),
    "optima": {},
}
"""Method -> the options in which its runs differ from the settings that all share."""


ASKED = "comparison.json"


@dataclass(frozen=True)
class Asked:
    """comparison.json: the runs that a comparison is made of, where they are scored, and the command."""

    task: tuple[str, ...]
    method: tuple[str, ...]
    seeds: int
    split: str
    command: str


@dataclass(frozen=True)
class _Cell:
    """One run of the comparison."""

    task: str
    method: str
    seed: int

    def path(self, root: Path) -> Path:
        return root / self.task / self.method / f"seed-{self.seed}"


def run_command(root: Path, task: str, method: str, seed: int) -> list[str]:
    """The command of one run of the comparison in `root`; modules in the current folder do not take part (-P)."""
    path = _Cell(task, method, seed).path(root)
    words = [sys.executable, "-P", "-m", "optima.run", "distill", "--config", str(root / "settings.yaml")]
    words += ["--task", task, "--seed", str(seed), "--run", str(path), "--quiet", "true", *method_options(method)]
    return words + (["--resume", "true"] if (path / CONFIG).exists() else [])


def method_options(method: str) -> list[str]:
    """The options of a method as words of a command line."""
    words = []
    for name, value in METHODS[method].items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def compare(config: CompareConfig) -> None:
    """Runs what is missing, prints a table a task, and writes comparison.html and comparison.md."""
    config = replace(config, task=_served(config))
    _settle(config)
    command = "optima " + shlex.join(sys.argv[1:])
    asked = Asked(tuple(config.task), tuple(config.method), config.seeds, config.split, command)
    write_atomically(config.run / ASKED, json.dumps(plain(asked)).encode())
    _run_missing([cell for cell in _cells(asked) if not (cell.path(config.run) / SUMMARY).exists()], config)
    outcomes = [_outcome(cell, config.run, config.split) for cell in _cells(asked)]
    text = f"{markdown(outcomes)}\n`{command}`\n"
    write_atomically(config.run / "comparison.md", text.encode())
    _print(outcomes, config, draw_comparison(config.run))


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
    page = output or run / "comparison.html"
    return write_comparison(outcomes, page, command=asked.command, split=asked.split)


def _cells(asked: Asked) -> list[_Cell]:
    return [_Cell(task, method, seed) for task in asked.task for seed in range(asked.seeds) for method in asked.method]


def _served(config: CompareConfig) -> list[Task]:
    """The tasks to compare on: of all four, which are the default, a data set other than pictograms serves one."""
    name = config.distill.data.name
    if name == "pictograms":
        return config.task
    served = FORMATS[name].task
    if set(config.task) not in ({served}, set(TASKS)):
        raise OptimaError(f"data {name} serves task {served}, not {', '.join(config.task)}; give --task {served}")
    return [served]


def _settle(config: CompareConfig) -> None:
    """Writes the shared settings, or refuses to mix two comparisons in one directory."""
    values = plain(replace(config.distill, resume=False))
    for name in ("task", "run", "seed", "quiet", "resume"):
        values.pop(name)
    path = config.run / "settings.yaml"
    if path.exists():
        before, now = (flat(found) for found in (load_yaml(path.read_text(encoding="utf-8"), str(path)), values))
        for name in sorted(before | now):
            if before.get(name) != now.get(name):
                raise OptimaError(
                    f"{config.run} holds runs with distill.{name} {before.get(name)}, now it is {now.get(name)}; "
                    "give the same settings, or a new directory with --run"
                )
        return
    try:
        config.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptimaError(f"cannot make the directory {config.run}: {error.strerror}; give another --run") from error
    if not all(path.name.endswith(".part") for path in config.run.iterdir()):  # of one that was killed at once
        raise OptimaError(f"directory {config.run} holds something, but no comparison; give another with --run")
    write_atomically(path, yaml.safe_dump(values, sort_keys=False).encode())


def _run_missing(cells: Sequence[_Cell], config: CompareConfig) -> None:
    """Raises OptimaError naming the first run that failed; runs under way are stopped, and save themselves."""
    started = time.monotonic()
    # The pool waits for its threads, so the processes that they wait for must have been stopped before.
    with ThreadPoolExecutor(config.jobs) as pool, _processes() as start:
        pending = {pool.submit(start, cell, config.run): cell for cell in cells}
        try:
            for done, finished in enumerate(as_completed(pending), 1):
                cell = pending[finished]
                finished.result()
                outcome = _outcome(cell, config.run, config.split)
                left = (time.monotonic() - started) / done * (len(cells) - done)
                print(
                    f"{done}/{len(cells)}  {cell.task}  {cell.method}  seed {cell.seed}: {outcome.score:.1f} % in "
                    f"{outcome.seconds:.0f} s  {left / 60:.0f} min left",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _processes() -> Iterator[Any]:
    """Yields a function that runs one cell to its end; leaving stops what still runs."""
    running: set[subprocess.Popen[str]] = set()
    stopped = False

    def run(cell: _Cell, root: Path) -> None:
        if stopped:
            return
        log = cell.path(root).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            process = subprocess.Popen(
                run_command(root, cell.task, cell.method, cell.seed),
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


def _outcome(cell: _Cell, root: Path, split: str) -> Outcome:
    summary, report = read_summary(cell.path(root) / SUMMARY), cell.path(root) / "report.html"
    metric = summary.headline_metric
    score = summary.learning_curve[-1][metric] if split == "validation" else summary.scores["after"][metric]
    page = report if report.exists() else None
    return Outcome(cell.task, cell.method, cell.seed, score, summary.seconds, summary.peak_mib, page)


def _ends(config: CompareConfig, task: Task) -> str:
    """What the student scored before distillation, and the teacher."""
    summary = read_summary(_Cell(task, "optima", 0).path(config.run) / SUMMARY)
    before, teacher = (summary.scores[model][summary.headline_metric] for model in ("before", "teacher"))
    return f"Student before {before:.1f}, teacher {teacher:.1f} (test)."


def _print(outcomes: Sequence[Outcome], config: CompareConfig, page: Path) -> None:
    console = make_console()
    ends = {str(task): f" {_ends(config, task)}" for task in config.task}
    for task, rows in method_rows(outcomes).items():
        headings = [heading.format("optima") for heading in HEADINGS]
        table = make_table(*headings, title=f"{task_title(task)}, {config.split} split")
        table.columns[HEADINGS.index("")].justify = "left"
        for row in row_texts(rows):
            table.add_row(*astuple(row))
        console.print(table)
        console.print(f"{conclusion(rows)}{ends.get(task, '')}")
    console.print(f"Comparison: {page}", soft_wrap=True)
