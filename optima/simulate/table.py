"""The results as tables: policies down, environments across, the best of each column in bold."""

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from optima.simulate.run import Trial


def regret_table(policies: list[str], trials: dict[str, Trial], rounds: int) -> Table:
    """Cumulative regret after the last round, with standard errors over seeds."""

    def cell(trial: Trial, i: int) -> tuple[float, float]:
        return trial.final_regret[i].mean().item(), trial.final_regret_error[i].item()

    return _table(f"Regret after {rounds} rounds (less is better)", policies, trials, cell, min)


def gap_table(policies: list[str], trials: dict[str, Trial], early_round: int) -> Table:
    """Percentage of the gap from uniform choice to the oracle that is closed early on, with standard errors."""

    def cell(trial: Trial, i: int) -> tuple[float, float]:
        return 100 * trial.early_gap_closed[i].item(), 100 * trial.early_gap_closed_error[i].item()

    title = f"Gap from uniform choice to the oracle closed by round {early_round}, in % (more is better)"
    return _table(title, policies, trials, cell, max)


def _table(
    title: str,
    policies: list[str],
    trials: dict[str, Trial],
    cell: Callable[[Trial, int], tuple[float, float]],
    best: Callable[[list[float]], float],
) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("policy", overflow="fold")
    columns = []
    for environment, trial in trials.items():
        table.add_column(environment, justify="right", no_wrap=True)
        values = [cell(trial, i) for i in range(len(policies))]
        winner = best([value for value, _ in values])
        digits = 1 if max(abs(value) for value, _ in values) >= 10 else 2
        columns.append([_format(value, error, digits, value == winner) for value, error in values])
    for i, name in enumerate(policies):
        table.add_row(Text(name), *(column[i] for column in columns))
    return table


def _format(value: float, error: float, digits: int, bold: bool) -> Text:
    return Text(f"{value:.{digits}f}±{error:.{digits}f}", style="bold" if bold else "")
