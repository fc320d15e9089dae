"""What a person sees while a run goes on: a live panel on a terminal, a plain line a round elsewhere, or nothing.

Beside that, trackers on request.
"""

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from optima.runs.tracking import Tracker, scalars_of
from optima_core.records import RoundRecord


class Display(Protocol):
    """Where the progress of a run is shown."""

    def note(self, message: str) -> None:
        """A line of its own."""

    def score(self, step: int, metric: str, value: float) -> None:
        """The student was scored on validation items after an optimiser step."""

    def round(self, record: RoundRecord) -> None:
        """A round has ended."""

    def close(self) -> None:
        """Nothing more will be shown live."""


def make_display(arms: Sequence[str], rounds: int, done: int, quiet: bool) -> Display:
    """The display that fits standard output. `done` rounds were already there when the run was resumed."""
    if quiet:
        return _Silent()
    if Console().is_terminal:
        return _Panel(arms, rounds, done)
    return _Lines(rounds, done)


class Tracked:
    """A display whose numbers also go to trackers."""

    def __init__(self, shown: Display, trackers: Sequence[Tracker]) -> None:
        self._shown, self._trackers = shown, trackers

    def note(self, message: str) -> None:
        self._shown.note(message)

    def score(self, step: int, metric: str, value: float) -> None:
        self._log({f"validation/{metric}": value}, step)
        self._shown.score(step, metric, value)

    def round(self, record: RoundRecord) -> None:
        self._log(scalars_of(record), record.step)
        self._shown.round(record)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        self._shown.close()

    def _log(self, values: dict[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step)


class _Pace:
    """Rounds a second since the start, and what is left at that pace."""

    def __init__(self, rounds: int, done: int) -> None:
        self.rounds, self.done, self.started = rounds, done, time.monotonic()

    def remaining(self, round_number: int) -> float:
        """Seconds."""
        elapsed = time.monotonic() - self.started
        return elapsed / max(1, round_number - self.done) * (self.rounds - round_number)

    def steps_per_second(self, record: RoundRecord) -> float:
        steps = record.step / record.round * (record.round - self.done)
        return steps / max(1e-9, time.monotonic() - self.started)


def _score(step: int, metric: str, value: float) -> str:
    return f"step {step}: validation {metric} {value:.1f}{' %' if 'accuracy' in metric else ''}"


class _Silent:
    def note(self, message: str) -> None:
        pass

    def score(self, step: int, metric: str, value: float) -> None:
        pass

    def round(self, record: RoundRecord) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    def __init__(self, rounds: int, done: int) -> None:
        self.pace = _Pace(rounds, done)

    def note(self, message: str) -> None:
        print(message, flush=True)

    def score(self, step: int, metric: str, value: float) -> None:
        self.note(_score(step, metric, value))

    def round(self, record: RoundRecord) -> None:
        beliefs = ", ".join(f"{name} {_posterior(record, name)}" for name in record.pulls if name in record.mean)
        losses = "".join(f"{name} loss {record.losses[name]:.3f}  " for name in ("task",) if name in record.losses)
        print(
            f"round {record.round}/{self.pace.rounds}  {'+'.join(record.modules)}  reward {record.reward:+.4f}  "
            f"{losses}{f'[{beliefs}]  ' if beliefs else ''}{self.pace.steps_per_second(record):.1f} steps/s  "
            f"{_clock(self.pace.remaining(record.round))} left",
            flush=True,
        )

    def close(self) -> None:
        sys.stdout.flush()


class _Panel:
    def __init__(self, arms: Sequence[str], rounds: int, done: int) -> None:
        self.arms = arms
        self.pace = _Pace(rounds, done)
        self.live = Live(console=Console(markup=False, highlight=False), refresh_per_second=4)
        self.live.start()

    def note(self, message: str) -> None:
        self.live.console.print(message)

    def score(self, step: int, metric: str, value: float) -> None:
        self.note(_score(step, metric, value))

    def round(self, record: RoundRecord) -> None:
        chosen = "+".join(record.modules)
        arms = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("module", "rounds", "expected reward"):
            arms.add_column(heading, justify="left" if heading == "module" else "right")
        for name in dict.fromkeys([*self.arms, *record.pulls]):
            style = "bold green" if name == chosen else ""
            mark = "> " if name == chosen else "  "
            arms.add_row(mark + name, str(record.pulls.get(name, 0)), _posterior(record, name), style=style)
        losses = Text("losses  ", style="dim")
        for name in ("task", "logits"):
            if name in record.losses:
                losses.append(f"{name} {record.losses[name]:.3f}   ", style="default")
        losses.append(f"reward {record.reward:+.4f}", style="default")
        status = Table.grid(padding=(0, 2))
        status.add_row(
            Text(f"round {record.round}/{self.pace.rounds}", style="bold"),
            ProgressBar(total=self.pace.rounds, completed=record.round, width=24),
            f"{self.pace.steps_per_second(record):.1f} steps/s",
            f"{_clock(self.pace.remaining(record.round))} left",
        )
        self.live.update(Group(status, arms, losses))

    def close(self) -> None:
        self.live.stop()


def _posterior(record: RoundRecord, arm: str) -> str:
    """What the bandit expects of an arm; a single round tells nothing of how far its rewards spread."""
    if arm not in record.mean:
        return "" if arm in record.pulls else "untried"
    spread = f"± {record.std[arm]:.4f}" if record.pulls[arm] > 1 else "(one round)"
    return f"{record.mean[arm]:+.4f} {spread}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
