"""The drawings of one run: what was chosen, what the bandit believed, what it was paid, and how every loss fell."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from optima.report.formatting import label, spelled
from optima.report.svg import HEAT_LEVELS, RISE_LEVELS, Layout, arm_colour, colour
from optima.runs.rows import Round, Summary
from optima_core.terms import LAYER_KINDS

PIXELS_PER_INCH = 72
LINE = 1.8


def figure_of(layout: Layout, height: float) -> Figure:
    """An empty figure, `height` in CSS pixels."""
    figure = Figure(figsize=(layout.width / PIXELS_PER_INCH, height / PIXELS_PER_INCH))
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.08, wspace=0.05, hspace=0)
    return figure


def dress(axes: Axes, title: str = "", grid: bool = True) -> None:
    """The house style: no box, a quiet grid, the title where reading starts."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colour("grid"))
    axes.tick_params(colors=colour("muted"), length=0, pad=5)
    axes.set_title(title, loc="left", color=colour("ink"), pad=9)
    axes.xaxis.label.set_color(colour("muted"))
    axes.yaxis.label.set_color(colour("muted"))
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="y", color=colour("grid"), linewidth=0.8)


def arms_of(rounds: Sequence[Round]) -> list[str]:
    """Every arm seen, in the policy's order where it kept a posterior, else in order of appearance."""
    return list(dict.fromkeys([*(arm for r in rounds for arm in r.mean), *(r.chosen for r in rounds)]))


def modules_of(rounds: Sequence[Round]) -> list[str]:
    return list(dict.fromkeys(module for arm in arms_of(rounds) for module in arm.split("+")))


def colour_indices(rounds: Sequence[Round]) -> dict[str, int]:
    """A palette place for every module and arm; an arm of one module shares its module's."""
    return {name: i for i, name in enumerate(dict.fromkeys([*modules_of(rounds), *arms_of(rounds)]))}


def timeline(rounds: Sequence[Round], layout: Layout) -> Figure:
    """Panels over rounds: the chosen modules, what their losses weighed, the posterior of each arm, the reward.

    Weights are shown if they changed, posteriors if the policy keeps them.
    """
    colours = colour_indices(rounds)
    modules = modules_of(rounds)
    with_weights = weights_changed(rounds)
    with_posterior = any(r.mean for r in rounds)
    row, tall = (30, 190) if layout.compact else (24, 210)
    heights = [row * len(modules) + 20, *[tall] * (with_weights + with_posterior), 130]
    figure = figure_of(layout, sum(heights) + 42 * len(heights) + 20)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    _chosen(panels[0], rounds, modules, colours, layout)
    if with_weights:
        _weights(panels[1], rounds, colours, layout)
    if with_posterior:
        _posterior(panels[-2], rounds, colours, layout)
    _rewards(panels[-1], rounds, colours)
    panels[-1].set_xlabel("round")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if layout.compact else 12))
    panels[-1].set_xlim(rounds[0].round - 0.5, rounds[-1].round + 0.5)
    return figure


def stretches(numbers: Iterable[int]) -> list[tuple[float, float]]:
    """Consecutive rounds as (start, width) bars, so that long stays are one shape."""
    bars = []
    for _, group in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        bars.append((run[0] - 0.46, len(run) - 0.08))
    return bars


def _chosen(
    axes: Axes, rounds: Sequence[Round], modules: Sequence[str], colours: Mapping[str, int], layout: Layout
) -> None:
    strengths = [{module: r.strengths.get(module, 1.0) for module in r.modules} for r in rounds]
    levels = sorted({strength for chosen in strengths for strength in chosen.values()}, reverse=True)
    by_strength = ", the taller the stronger" if len(levels) > 1 else ""
    dress(axes, f"Module distilled in each round{by_strength}", grid=False)
    for place, module in enumerate(modules):
        height, bottom = (0.5, place + 0.05) if layout.compact else (0.72, place - 0.36)
        first, last = rounds[0].round - 0.46, rounds[-1].round - rounds[0].round + 0.92
        axes.broken_barh([(first, last)], (bottom, height), facecolors=colour("grid"), alpha=0.45)
        for i, level in enumerate(levels):
            numbers = [r.round for r, chosen in zip(rounds, strengths, strict=True) if chosen.get(module) == level]
            taken = height * (1 - i / (len(levels) + 1))
            span = (bottom + height - taken, taken)
            axes.broken_barh(stretches(numbers), span, facecolors=arm_colour(colours[module]))
        if layout.compact:
            axes.text(rounds[0].round - 0.46, place - 0.06, label(module), color=colour("muted"), size=11)
    axes.set_ylim(len(modules) - 0.4, -0.55)
    if layout.compact:
        axes.set_yticks([])
    else:
        axes.set_yticks(range(len(modules)), [label(module) for module in modules])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(labelbottom=False)


def weights_changed(rounds: Sequence[Round]) -> bool:
    """Whether what the layer losses weighed was measured during the run; otherwise the configuration says it."""
    return any(r.weights != rounds[0].weights for r in rounds)


def _weights(axes: Axes, rounds: Sequence[Round], colours: Mapping[str, int], layout: Layout) -> None:
    dress(axes, "Weights; of maps, dashed" if layout.compact else "Weights of hidden states; of maps, dashed")
    x = [r.round for r in rounds]
    for kind, module in product(LAYER_KINDS, modules_of(rounds)):
        line = "--" if kind == "attention" else "-"
        weights = [r.weights.get(f"{kind}/{module}", math.nan) for r in rounds]
        axes.plot(x, weights, line, color=arm_colour(colours[module]), linewidth=LINE)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(labelbottom=False)


def _posterior(axes: Axes, rounds: Sequence[Round], colours: Mapping[str, int], layout: Layout) -> None:
    dress(
        axes,
        "Expected reward, ± 1 std"
        if layout.compact
        else "Reward the bandit expects: posterior mean ± 1 standard deviation",
    )
    x = np.array([r.round for r in rounds])
    for arm in arms_of(rounds):
        mean = np.array([r.mean.get(arm, math.nan) for r in rounds])
        std = np.array([r.std.get(arm, math.nan) for r in rounds])
        tint = arm_colour(colours[arm])
        axes.fill_between(x, mean - std, mean + std, color=tint, alpha=0.16, linewidth=0)
        axes.plot(x, mean, color=tint, linewidth=LINE)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(labelbottom=False)


def _rewards(axes: Axes, rounds: Sequence[Round], colours: Mapping[str, int]) -> None:
    dress(axes, "Reward of the round")
    paid = [r for r in rounds if math.isfinite(r.reward)]
    axes.bar(
        [r.round for r in paid],
        [r.reward for r in paid],
        width=0.8,
        color=[arm_colour(colours[r.chosen]) for r in paid],
    )
    axes.axhline(0, color=colour("muted"), linewidth=0.8)


@dataclass(frozen=True)
class LossRow:
    """A row of the heat map: a loss, or, with `name` None, the heading of the module whose losses follow."""

    name: str | None
    label: str
    module: str | None


def loss_rows(names: Iterable[str]) -> list[LossRow]:
    """The heat map's rows, top to bottom: task and logits, then module by module, hidden before attention."""
    parts = [(name, name.split("/")) for name in names]
    rows = [LossRow(name, label(name), None) for name, split in parts if len(split) < 3]
    for module in dict.fromkeys(split[1] for _, split in parts if len(split) >= 3):
        rows.append(LossRow(None, label(module), module))
        own = [(split[0], split[2:], name) for name, split in parts if len(split) >= 3 and split[1] == module]
        for kind in dict.fromkeys(sorted((kind for kind, _, _ in own), key=lambda kind: (kind != "hidden", kind))):
            rows += [LossRow(name, label(f"{kind} {' '.join(rest)}"), module) for k, rest, name in own if k == kind]
    return rows


def relative_losses(rounds: Sequence[Round]) -> dict[str, NDArray[np.float64]]:
    """Each probe loss over rounds, divided by its first finite value; one whose first is not positive is left out."""
    relative = {}
    for name in dict.fromkeys(name for r in rounds for name in r.probe):
        values = np.array([r.probe.get(name, math.nan) for r in rounds], dtype=np.float64)
        finite = values[np.isfinite(values)]
        if finite.size and finite[0] > 0:
            relative[name] = values / finite[0]
    return relative


def heat_floor(relative: Mapping[str, NDArray[np.float64]]) -> float:
    """The ratio that takes the strongest colour: the lowest one seen, but never so close to 1 that noise would glow."""
    lowest = min((float(np.nanmin(values)) for values in relative.values()), default=1.0)
    return min(0.9, max(lowest, 1e-3))


def heat_map(rounds: Sequence[Round], layout: Layout) -> Figure:
    """Probe losses relative to their first value, a row a loss, a column a round (or the mean of a few)."""
    relative = relative_losses(rounds)
    rows = loss_rows(relative)
    colours = colour_indices(rounds)
    numbers = np.array([r.round for r in rounds])
    edges = _column_edges(len(rounds), 60 if layout.compact else 140)
    left = np.append(numbers[edges[:-1]], numbers[-1] + 1) - 0.5
    height = 15 if layout.compact else 17
    tops = np.cumsum([0.0, *((1.6 if row.name is None else 1.0) for row in rows)])
    figure = figure_of(layout, height * tops[-1] + 46)
    axes = figure.subplots()
    dress(axes, grid=False)
    palette = ListedColormap(
        [colour(f"heat-{i}") for i in reversed(range(HEAT_LEVELS))] + [colour(f"rise-{i}") for i in range(RISE_LEVELS)]
    )
    for row, top, bottom in zip(rows, tops[:-1], tops[1:], strict=True):
        if row.name is None:
            axes.text(left[0], bottom - 0.42, row.label, color=colour("ink"), size=11.5, va="bottom")
            chosen = stretches(r.round for r in rounds if row.module in r.modules)
            axes.broken_barh(chosen, (bottom - 0.34, 0.24), facecolors=arm_colour(colours.get(str(row.module), 0)))
            continue
        binned = [_mean(relative[row.name][start:stop]) for start, stop in pairwise(edges)]
        levels = np.array([_level(ratio, heat_floor(relative)) for ratio in binned])
        axes.pcolormesh(
            left,
            [top + 0.04, bottom - 0.04],
            levels[None, :],
            cmap=palette,
            vmin=-0.5,
            vmax=palette.N - 0.5,
            edgecolors="face",
            linewidth=0.6,
        )
    data = [(row, (top + bottom) / 2) for row, top, bottom in zip(rows, tops[:-1], tops[1:], strict=True) if row.name]
    axes.set_yticks([middle for _, middle in data], [row.label for row, _ in data])
    axes.set_ylim(tops[-1], 0)
    axes.set_xlim(left[0], left[-1])
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if layout.compact else 12))
    axes.spines["bottom"].set_visible(False)
    return figure


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _column_edges(count: int, most: int) -> NDArray[np.int64]:
    edges: NDArray[np.int64] = np.unique(np.append(np.arange(0, count, math.ceil(count / most)), count))
    return edges


def _level(ratio: float, floor: float) -> float:
    """The palette place of a ratio, on a logarithmic scale: 0 at `floor` or below, `HEAT_LEVELS` and up above 1."""
    if not math.isfinite(ratio):
        return math.nan
    fallen = math.log(max(ratio, 1e-9)) / math.log(floor)
    if fallen >= 0:
        return HEAT_LEVELS - 1 - min(HEAT_LEVELS - 1, math.floor(fallen * HEAT_LEVELS))
    return HEAT_LEVELS + min(RISE_LEVELS - 1, math.floor(-fallen * HEAT_LEVELS))


def curve_panels(rounds: Sequence[Round], summary: Summary) -> list[str]:
    """Which learning curves can be drawn: "score", then the losses of the objective that are no layer's."""
    losses = [row.name for row in loss_rows(dict.fromkeys(n for r in rounds for n in [*r.losses, *r.probe]))]
    scored = any(summary.headline_metric in point for point in summary.learning_curve)
    return ["score"] * scored + [name for name in losses if name and "/" not in name]


def learning_curves(rounds: Sequence[Round], summary: Summary, layout: Layout) -> Figure:
    """Over steps: the headline score (dashed: the teacher's), and each loss on training and on probe batches."""
    names = curve_panels(rounds, summary)
    rows, columns = (len(names), 1) if layout.compact else (1, len(names))
    figure = figure_of(layout, 190 * rows if layout.compact else 250)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=True):
        if name == "score":
            _score_curve(axes, summary)
        else:
            _loss_curve(axes, rounds, name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.margins(x=0.01)
        if axes is panels[-1] or not layout.compact:
            axes.set_xlabel("optimiser step")
    return figure


def _score_curve(axes: Axes, summary: Summary) -> None:
    metric = summary.headline_metric
    dress(axes, spelled(metric))
    points = [(point["step"], point[metric]) for point in summary.learning_curve if {"step", metric} <= point.keys()]
    axes.plot(*zip(*points, strict=True), color=colour("after"), linewidth=LINE, marker="o", markersize=3)
    teacher = summary.scores["teacher"][metric]
    axes.axhline(teacher, color=colour("teacher"), linewidth=1.2, dashes=(4, 3))
    axes.annotate(
        "teacher",
        (1, teacher),
        (0, 3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        color=colour("muted"),
        size=11,
        ha="right",
        va="bottom",
    )
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0), high + 0.08 * (high - min(low, 0)))


def _loss_curve(axes: Axes, rounds: Sequence[Round], name: str) -> None:
    dress(axes, f"{spelled(name)} loss")
    for values, style, legend in (
        ([r.losses.get(name, math.nan) for r in rounds], {"color": colour("before"), "linewidth": 1.2}, "training"),
        ([r.probe.get(name, math.nan) for r in rounds], {"color": colour("after"), "linewidth": LINE}, "probe"),
    ):
        if any(math.isfinite(value) for value in values):
            axes.plot([r.step for r in rounds], values, label=legend, **style)  # type: ignore[arg-type]
    axes.legend(frameon=False, labelcolor=colour("muted"), fontsize=11, loc="upper right", handlelength=1.4)
