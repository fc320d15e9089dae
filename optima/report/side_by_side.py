"""Several runs on one page: scores, cost, what each chose when, learning curves, and differing configuration."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optima.report import formatting, plots
from optima.report.links import address
from optima.report.page import Bar, Fact, facts, hero, render, write_page
from optima.report.svg import Layout, arm_colour, colour, inline
from optima.runs.reading import Run, read_run
from optima.runs.rows import Sample

SHOWN_SAMPLES = 12


def write_side_by_side(run_dirs: Sequence[Path], output: Path) -> Path:
    """Writes one HTML file that sets runs side by side, and returns its path.

    Raises:
        ValueError: fewer than two runs are given.
        OptimaError: one of them cannot be read; one line says which and why.
    """
    if len(run_dirs) < 2:
        raise ValueError(f"run_dirs: {len(run_dirs)} given; two or more run directories are needed")
    return write_page(render_side_by_side([read_run(Path(path)) for path in run_dirs], Path(output)), Path(output))


def render_side_by_side(runs: Sequence[Run], output: Path) -> str:
    """The page of several runs, as HTML; `output` is where it is to lie."""
    names = run_names(runs)
    swatch = {
        name: i for i, name in enumerate(dict.fromkeys(a for run in runs for a in plots.colour_indices(run.rounds)))
    }
    panels = _shared_panels(runs)
    return render(
        "side_by_side.html",
        title=f"{len(runs)} runs side by side",
        rows=[_row(name, run, output) for name, run in zip(names, runs, strict=True)],
        fact_names=list(dict.fromkeys(fact.name for run in runs for fact in facts(run.summary))),
        scored_on=" and ".join(dict.fromkeys(run.summary.scored_on for run in runs)).capitalize(),
        swatch=swatch,
        arms=[arm for arm in swatch if any(r.chosen == arm for run in runs for r in run.rounds)],
        choices=inline(
            lambda layout: _choices(names, runs, swatch, layout),
            "choices",
            "Chosen arm of every round, a row a run; the same as shares in the table above",
        ),
        curves=inline(
            lambda layout: _curves(names, runs, panels, layout),
            "curves",
            "Learning curves of every run: " + ", ".join(map(formatting.spelled, panels)),
        )
        if panels
        else None,
        differences=differences(names, runs),
        samples=_samples(names, runs),
        commands=[(name, run.summary.command) for name, run in zip(names, runs, strict=True) if run.summary.command],
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """The directories' names, with as much of the path before them as tells them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


@dataclass(frozen=True)
class Row:
    """A run's line of the table; `mix` holds its arms with their share of the rounds in per cent.

    report: the address of its own page, if it has one.
    """

    name: str
    report: str | None
    task: str
    hero: Bar
    facts: Mapping[str, Fact]
    mix: Mapping[str, float]


def _row(name: str, run: Run, output: Path) -> Row:
    chosen = [r.chosen for r in run.rounds]
    report = run.path / "report.html"
    return Row(
        name=name,
        report=address(report, output) if report.exists() else None,
        task=run.summary.task,
        hero=hero(run.summary),
        facts={fact.name: fact for fact in facts(run.summary)},
        mix={arm: 100 * chosen.count(arm) / len(chosen) for arm in plots.arms_of(run.rounds) if arm in chosen},
    )


def _choices(names: Sequence[str], runs: Sequence[Run], swatch: Mapping[str, int], layout: Layout) -> Figure:
    row = 44 if layout.compact else 28
    figure = plots.figure_of(layout, row * len(runs) + 46)
    axes = figure.subplots()
    plots.dress(axes, grid=False)
    first, last = min(run.rounds[0].round for run in runs), max(run.rounds[-1].round for run in runs)
    for place, (name, run) in enumerate(zip(names, runs, strict=True)):
        height, bottom = (0.44, place + 0.02) if layout.compact else (0.7, place - 0.35)
        for arm in plots.arms_of(run.rounds):
            bars = plots.stretches(r.round for r in run.rounds if r.chosen == arm)
            if bars:
                axes.broken_barh(bars, (bottom, height), facecolors=arm_colour(swatch[arm]))
        if layout.compact:
            axes.text(first - 0.46, place - 0.08, name, color=colour("muted"), size=10)
    axes.set_ylim(len(runs) - 0.45, -0.55)
    axes.set_yticks(
        [] if layout.compact else range(len(runs)), [] if layout.compact else [formatting.label(name) for name in names]
    )
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if layout.compact else 12))
    axes.spines["bottom"].set_visible(False)
    return figure


def _shared_panels(runs: Sequence[Run]) -> list[str]:
    """The curves that at least two runs have; scores only where they are the same metric of the same task."""
    panels = [plots.curve_panels(run.rounds, run.summary) for run in runs]
    shared = [
        name for name in dict.fromkeys(name for own in panels for name in own) if sum(name in p for p in panels) > 1
    ]
    if len({(run.summary.task, run.summary.headline_metric) for run in runs}) > 1:
        shared = [name for name in shared if name != "score"]
    return shared


def _curves(names: Sequence[str], runs: Sequence[Run], panels: Sequence[str], layout: Layout) -> Figure:
    rows, columns = (len(panels), 1) if layout.compact else (1, len(panels))
    legend = 20 * len(runs) if layout.compact else 26 * math.ceil(len(runs) / 4)
    figure = plots.figure_of(layout, (190 * rows if layout.compact else 250) + legend)
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(all_axes, panels, strict=True):
        title = (
            formatting.spelled(runs[0].summary.headline_metric)
            if panel == "score"
            else f"{panel} loss on probe batches"
        )
        plots.dress(axes, title)
        for place, run in enumerate(runs):
            steps, values = _curve(run, panel)
            axes.plot(
                steps,
                values,
                color=arm_colour(place),
                linewidth=plots.LINE,
                dashes=(1, 0) if place < 8 else (3, 2),
                marker="o" if len(steps) == 1 else None,  # a line of one point is nothing
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.margins(x=0.01)
        if axes is all_axes[-1] or not layout.compact:
            axes.set_xlabel("optimiser step")
    figure.legend(
        all_axes[0].get_lines(),
        names,
        loc="outside lower left",
        ncols=1 if layout.compact else min(4, len(runs)),
        frameon=False,
        labelcolor=colour("ink"),
        fontsize=10.5,
    )
    return figure


def _curve(run: Run, panel: str) -> tuple[list[float], list[float]]:
    if panel == "score":
        metric = run.summary.headline_metric
        points = [(p["step"], p[metric]) for p in run.summary.learning_curve if {"step", metric} <= p.keys()]
    else:
        points = [(r.step, r.probe[panel]) for r in run.rounds if panel in r.probe]
    return [step for step, _ in points], [value for _, value in points]


def differences(names: Sequence[str], runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The configuration keys ("policy.gamma") whose values differ between runs, each with its value per run."""
    flat = [dict(_leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    table = [(key, [one.get(key, formatting.ABSENT) for one in flat]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, default=str)


@dataclass(frozen=True)
class SharedSample:
    """A sample that several runs have in common, with what each run's student said: (run, answer, correct)."""

    images: tuple[str, ...]
    prompt: str | None
    reference: str
    said: Sequence[tuple[str, str, bool]]


def _samples(names: Sequence[str], runs: Sequence[Run]) -> list[SharedSample]:
    """Samples all runs share but not all get right; equal place, prompt, reference and images make them the same."""
    shared = []
    for samples in zip(*(run.samples for run in runs), strict=False):
        first = samples[0]
        same = all((s.prompt, s.reference) == (first.prompt, first.reference) for s in samples) and all(
            _contents(s) == _contents(first) for s in samples[1:]
        )
        if same and len({s.correct["after"] for s in samples}) > 1:
            said = [(name, s.after, s.correct["after"]) for name, s in zip(names, samples, strict=True)]
            shared.append(SharedSample(first.images, first.prompt, first.reference, said))
    return shared[:SHOWN_SAMPLES]


def _contents(sample: Sample) -> list[bytes]:
    return [Path(image).read_bytes() for image in sample.images]
