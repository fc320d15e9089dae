"""Whether OPTIMA is worth it: every method over several seeds against OPTIMA, as a table and as a page."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optima.report import formatting, plots
from optima.report.intervals import Interval, mean_interval, paired_difference
from optima.report.links import address
from optima.report.page import render, write_page
from optima.report.svg import Layout, colour, inline

MEAN_OF_TASKS = "mean_of_tasks"


@dataclass(frozen=True)
class Outcome:
    """What one run of a comparison came to. `score` is an accuracy on held-out items, in per cent, or a loss.

    report: its own page, if it has one. loss: the loss's name; all outcomes of a task have the same. scored_on: what
    the score was measured on.
    """

    task: str
    method: str
    seed: int
    score: float
    seconds: float
    peak_mib: float
    report: Path | None = None
    loss: str = ""
    scored_on: str = "test split"

    @property
    def said(self) -> str:
        """The score in words."""
        return f"{_loss_name(self.loss)} {formatting.plain(self.score)}" if self.loss else f"{self.score:.1f} %"


@dataclass(frozen=True)
class MethodRow:
    """A method on a task: its mean score, and its mean paired difference to the reference.

    score: with a 95% interval. difference: method minus reference, None for the reference itself and where no seed is
        shared; its interval is Bonferroni's: those of k methods hold together with 95%, each with 1 - 0.05/k.
    loss: the name of the loss that scores are, of which a lower one is better; empty of accuracies.
    """

    method: str
    scores: Mapping[int, float]
    score: Interval
    difference: Interval | None
    seconds: float
    peak_mib: float
    loss: str = ""

    @property
    def verdict(self) -> str:
        """ "better" or "worse" than the reference where the interval of the difference excludes 0.

        Else "not told apart"; empty for the reference itself and for a single shared seed.
        """
        if self.difference is None or not math.isfinite(self.difference.half_width):
            return ""
        if self.difference.low > 0:
            return "worse" if self.loss else "better"
        if self.difference.high < 0:
            return "better" if self.loss else "worse"
        return "not told apart"


def method_rows(outcomes: Iterable[Outcome], reference: str = "optima") -> dict[str, list[MethodRow]]:
    """Task -> its methods, best mean score first. Outcomes of one method on one task differ in their seed.

    Several tasks have their mean as one more, `MEAN_OF_TASKS`, of the methods and seeds that all of them share.

    Raises:
        ValueError: a task has no outcome of the reference, or a method has two for one seed.
    """
    outcomes = list(outcomes)
    means = _means(outcomes)
    if reference not in {mean.method for mean in means}:
        means = []
    by_task: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in [*outcomes, *means]:
        by_task.setdefault(outcome.task, {}).setdefault(outcome.method, []).append(outcome)
    return {task: _rows(task, methods, reference) for task, methods in by_task.items()}


def _means(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The means over tasks, one for each method and seed that has an outcome on every task; none of a single task."""
    tasks = {outcome.task for outcome in outcomes}
    runs: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        runs.setdefault((outcome.method, outcome.seed), []).append(outcome)
    return [
        Outcome(
            MEAN_OF_TASKS,
            method,
            seed,
            score=statistics.fmean(outcome.score for outcome in own),
            seconds=statistics.fmean(outcome.seconds for outcome in own),
            peak_mib=max(outcome.peak_mib for outcome in own),
        )
        for (method, seed), own in runs.items()
        if len(tasks) > 1 and {outcome.task for outcome in own} == tasks
    ]


def _rows(task: str, methods: Mapping[str, Sequence[Outcome]], reference: str) -> list[MethodRow]:
    if reference not in methods:
        raise ValueError(f"reference: no outcome of {reference!r} on task {task!r}; there are {', '.join(methods)}")
    scores = {method: {outcome.seed: outcome.score for outcome in own} for method, own in methods.items()}
    for method, own in methods.items():
        if len(scores[method]) < len(own):
            raise ValueError(
                f"outcomes: method {method!r} has a seed twice on task {task!r}; one outcome a seed is needed"
            )
    confidence = 1 - 0.05 / max(1, len(methods) - 1)
    rows = [
        MethodRow(
            method=method,
            scores=scores[method],
            score=mean_interval(list(scores[method].values())),
            difference=None
            if method == reference
            else paired_difference(scores[method], scores[reference], confidence),
            seconds=sum(outcome.seconds for outcome in own) / len(own),
            peak_mib=max(outcome.peak_mib for outcome in own),
            loss=own[0].loss,
        )
        for method, own in methods.items()
    ]
    return sorted(rows, key=lambda row: row.score.mean if row.loss else -row.score.mean)


def conclusion(rows: Sequence[MethodRow], reference: str = "optima") -> str:
    """What the table says of the reference, in a sentence, whether or not it is flattering."""
    name = formatting.spelled(reference)
    better = [formatting.spelled(row.method) for row in rows if row.verdict == "better"]
    worse = [formatting.spelled(row.method) for row in rows if row.verdict == "worse"]
    if better:
        beaten = f"; {name} is better than {_listed(worse)}" if worse else ""
        return f"{name} does not win: {_listed(better)} {'does' if len(better) == 1 else 'do'} better{beaten}."
    if len(worse) == len(rows) - 1 and worse:
        return f"{name} is better than every other method."
    if worse:
        return f"{name} is better than {_listed(worse)}; the others cannot be told apart from it."
    return f"No method can be told apart from {name}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@dataclass(frozen=True)
class MethodText:
    """A row of the table as printed; the same on a terminal, in Markdown and on the page."""

    method: str
    score: str
    difference: str
    verdict: str
    seeds: str
    seconds: str
    peak: str


def headings(rows: Sequence[MethodRow], reference: str = "optima") -> list[str]:
    """What stands above the columns of one task's table."""
    return ["method", _axis(rows), f"against {formatting.spelled(reference)}", "", "seeds", "time", "memory"]


def _axis(rows: Sequence[MethodRow]) -> str:
    return _loss_name(rows[0].loss) if rows[0].loss else "score, %"


def _loss_name(loss: str) -> str:
    return f"{formatting.spelled(loss)} loss"


def row_texts(rows: Sequence[MethodRow]) -> list[MethodText]:
    """The rows of one task as texts: accuracies with one decimal, losses with four digits of the largest."""
    largest = max(abs(row.score.mean) for row in rows)
    digits = 1 if not rows[0].loss or not largest else min(max(3 - math.floor(math.log10(largest)), 0), 9)
    return [
        MethodText(
            method=formatting.spelled(row.method),
            score=_interval(row.score, "", digits),
            difference=formatting.ABSENT if row.difference is None else _interval(row.difference, "+", digits),
            verdict=row.verdict,
            seeds=str(row.score.count),
            seconds=formatting.duration(row.seconds),
            peak=formatting.memory(row.peak_mib),
        )
        for row in rows
    ]


def _interval(interval: Interval, sign: str, digits: int) -> str:
    mean = f"{interval.mean:{sign}.{digits}f}".replace("-", "−")
    if not math.isfinite(interval.half_width):
        return mean
    return f"{mean} ±\N{NO-BREAK SPACE}{interval.half_width:.{digits}f}"


def markdown(outcomes: Iterable[Outcome], reference: str = "optima") -> str:
    """A Markdown table a task, each with its conclusion."""
    parts = []
    for task, rows in method_rows(outcomes, reference).items():
        heads = headings(rows, reference)
        lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        lines += [
            f"| {t.method} | {t.score} | {t.difference} | {t.verdict} | {t.seeds} | {t.seconds} | {t.peak} |"
            for t in row_texts(rows)
        ]
        parts.append(f"## {formatting.task_title(task)}\n\n{conclusion(rows, reference)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


@dataclass(frozen=True)
class TaskSection:
    """A task's part of the page; `reports` has the seed and the address of each run's own page, by method."""

    title: str
    conclusion: str
    plot: Markup
    headings: Sequence[str]
    rows: Sequence[MethodText]
    reports: Mapping[str, Sequence[tuple[int, str]]]


def write_comparison(outcomes: Sequence[Outcome], output: Path, reference: str = "optima", command: str = "") -> Path:
    """Writes the comparison of methods as one HTML file, and returns its path.

    Raises:
        ValueError: as `method_rows`.
    """
    sections = [
        TaskSection(
            title=formatting.task_title(task),
            conclusion=conclusion(rows, reference),
            plot=_plot(rows, reference, number),
            headings=headings(rows, reference),
            rows=row_texts(rows),
            reports=_reports(outcomes, task, Path(output)),
        )
        for number, (task, rows) in enumerate(method_rows(outcomes, reference).items())
    ]
    page = render(
        "comparison.html",
        title="Methods compared",
        sections=sections,
        command=command,
        scored_on=outcomes[0].scored_on,
        losses=bool(outcomes[0].loss),
    )
    return write_page(page, Path(output))


def _reports(outcomes: Sequence[Outcome], task: str, page: Path) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    for outcome in outcomes:
        if outcome.task == task and outcome.report is not None:
            method = formatting.spelled(outcome.method)
            found.setdefault(method, []).append((outcome.seed, address(outcome.report, page)))
    return found


def _plot(rows: Sequence[MethodRow], reference: str, number: int) -> Markup:
    label = f"Mean {_axis(rows)} with 95% interval: " + ", ".join(f"{t.method} {t.score}" for t in row_texts(rows))
    return inline(lambda layout: _dots(rows, reference, layout), f"methods-{number}", label)


def _dots(rows: Sequence[MethodRow], reference: str, layout: Layout) -> Figure:
    """A line a method: every seed as a faint dot, the mean as a full one, its interval as a bar."""
    figure = plots.figure_of(layout, (40 if layout.compact else 30) * len(rows) + 46)
    axes = figure.subplots()
    plots.dress(axes, grid=False)
    axes.grid(axis="x", color=colour("grid"), linewidth=0.8)
    for place, row in enumerate(rows):
        tint = colour("after" if row.method == reference else "muted")
        seeds = list(row.scores.values())
        axes.plot(seeds, [place] * len(seeds), "o", color=tint, alpha=0.35, markersize=5, mew=0)
        if math.isfinite(row.score.half_width):
            ends = [row.score.low, row.score.high]
            axes.plot(ends, [place, place], color=tint, linewidth=3, solid_capstyle="round")
        axes.plot([row.score.mean], [place], "o", color=tint, markersize=9, mew=1.5, mec=colour("surface"))
        if layout.compact:
            axes.text(
                0,
                place - 0.28,
                formatting.spelled(row.method),
                color=colour("ink"),
                transform=axes.get_yaxis_transform(),
            )
    axes.set_ylim(len(rows) - 0.4, -0.9 if layout.compact else -0.6)
    names = [formatting.spelled(row.method) for row in rows]
    axes.set_yticks([] if layout.compact else range(len(rows)), [] if layout.compact else names)
    low, high = axes.get_xlim()  # an interval of two seeds may leave what a score can be
    per_cent = not rows[0].loss and all(score <= 100 for row in rows for score in row.scores.values())
    axes.set_xlim(max(low, 0.0), min(high, 100.0) if per_cent else high)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5 if layout.compact else 10))
    axes.set_xlabel(_axis(rows))
    return figure
