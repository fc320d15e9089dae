"""Regret over time, and what was chosen when."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from optima.simulate.run import Trial

_BINS = 100


def plot_regret(policies: list[str], trials: dict[str, Trial]) -> Figure:
    """Mean cumulative regret against the round: one panel per environment, one line per policy."""
    figure = Figure(figsize=(4.2 * len(trials) + 2.4, 4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(trials), squeeze=False)[0]
    colours = matplotlib.colormaps["tab20"].resampled(20)
    for axes, (environment, trial) in zip(panels, trials.items(), strict=True):
        for p, name in enumerate(policies):
            axes.plot(trial.regret[p].numpy(force=True), label=name, color=colours(p % 20))
        axes.set(title=environment, xlabel="round")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("cumulative regret")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def plot_choices(policies: list[str], trials: dict[str, Trial]) -> Figure:
    """Share of the work spent on the module that is best at the time, second best and so on.

    One panel per policy and environment. Ranks, because which module is best differs from seed to seed.
    """
    figure = Figure(figsize=(2.6 * len(trials) + 1.6, 1.5 * len(policies) + 0.6), dpi=110, layout="constrained")
    panels = figure.subplots(len(policies), len(trials), squeeze=False, sharex=True, sharey=True)
    for column, (environment, trial) in enumerate(trials.items()):
        modules = trial.choices.shape[-1]
        colours = [matplotlib.colormaps["viridis"](rank / max(modules - 1, 1)) for rank in range(modules)]
        for row, name in enumerate(policies):
            axes = panels[row][column]
            rounds, share = _binned(trial.choices[row].numpy(force=True))
            axes.stackplot(rounds, share.T, colors=colours, labels=[_rank_name(rank) for rank in range(modules)])
            axes.margins(x=0)
            axes.set(ylim=(0, 1), yticks=[0, 1])
            if row == 0:
                axes.set_title(environment)
            if column == 0:
                axes.set_ylabel(name.replace("_", " ").replace(":", "\n"), rotation=0, ha="right", va="center")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def _binned(choices: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rounds at which runs of rounds start, and the mean of `choices` [rounds, modules] over each run."""
    starts = np.arange(0, len(choices), max(1, len(choices) // _BINS))
    lengths = np.diff(starts, append=len(choices))
    return starts, np.add.reduceat(choices, starts) / lengths[:, None]


def _rank_name(rank: int) -> str:
    return {0: "best", 1: "2nd", 2: "3rd"}.get(rank, f"{rank + 1}th")
