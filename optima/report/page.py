"""The report of one run: what the numbers come to in words, and the page around the plots."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from optima.report import formatting, images, plots
from optima.report.svg import ARM_COLOURS, HEAT_LEVELS, RISE_LEVELS, inline
from optima.runs.reading import Run, read_run
from optima.runs.rows import MODELS, Round, Sample, Summary
from optima_core.checkpoint import write_atomically

SHOWN_AT_ONCE = 6


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Writes a run directory's report to `output`, by default to `report.html` inside it, and returns its path.

    Raises:
        OptimaError: a required file of the run directory is missing or malformed; one line says which and why.
    """
    output = Path(run_dir) / "report.html" if output is None else Path(output)
    return write_page(render_report(read_run(Path(run_dir))), output)


def write_page(page: str, output: Path) -> Path:
    """Replaces a file, and makes the folders above it where they are missing; returns its path."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page.encode())
    return output


def render_report(run: Run) -> str:
    """The page of a run, as HTML."""
    rounds, summary = run.rounds, run.summary
    task = formatting.task_title(summary.task, run.data)
    return render(
        "report.html",
        run=run,
        summary=summary,
        task=task,
        title=f"{task}: {run.path.resolve().name}",
        headline=headline(summary),
        hero=hero(summary),
        facts=facts(summary),
        scores=score_table(summary),
        arms=arm_table(rounds),
        timeline=inline(lambda layout: plots.timeline(rounds, layout), "timeline", _timeline_label(rounds)),
        heat=_heat(rounds),
        curves=_curves(rounds, summary),
        samples=sample_groups(run.samples),
        shown=SHOWN_AT_ONCE,
        attention=_attention(run),
        swatch=plots.colour_indices(rounds),
        environment={key: str(value) for key, value in summary.environment.items()},
    )


def render_running(run: Run, every: int, used: str = "") -> str:
    """The page of a run that goes on, as HTML: the report without what only its end tells.

    every: seconds after which it is asked for again. used: what the run's process uses.
    """
    rounds = run.rounds
    task = formatting.task_title(run.summary.task, run.data)
    options = run.config.get("engine")
    total = int(options.get("rounds", 0)) if isinstance(options, dict) else 0
    return render(
        "running.html",
        run=run,
        summary=run.summary,
        task=task,
        title=f"{len(rounds)}/{total} {task}: {run.path.resolve().name}",
        headline=_state(rounds, total),
        done=len(rounds),
        rounds=max(total, len(rounds), 1),
        every=every,
        used=used,
        facts=_pace(rounds, total),
        arms=arm_table(rounds) if rounds else [],
        timeline=inline(lambda layout: plots.timeline(rounds, layout), "timeline", _timeline_label(rounds))
        if rounds
        else None,
        heat=_heat(rounds) if rounds else None,
        curves=_curves(rounds, run.summary) if len(rounds) > 1 else None,
        samples=[],
        shown=SHOWN_AT_ONCE,
        attention=None,
        swatch=plots.colour_indices(rounds),
        environment={},
    )


def _state(rounds: Sequence[Round], total: int) -> str:
    if not rounds:
        return "The first round is not over"
    return "All rounds are over; the models are being scored" if len(rounds) >= total else "The student is learning"


def render(template: str, **values: Any) -> str:
    """Fills a template of the package; everything but `Markup` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optima.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        name: getattr(formatting, name) for name in ("spelled", "plain", "count", "duration", "memory")
    }
    environment.filters["data_uri"] = images.data_uri
    environment.globals |= {"arm_colours": ARM_COLOURS, "heat_levels": HEAT_LEVELS, "rise_levels": RISE_LEVELS}
    return environment.get_template(template).render(**values)


def headline(summary: Summary) -> str:
    """The result in a sentence, whichever way it went."""
    teacher, before, after = (summary.scores[model][summary.headline_metric] for model in MODELS)
    if summary.losses:
        if after >= before:
            return "Distillation did not lower the student’s loss"
        if after > teacher:
            closed = 100 * (before - after) / (before - teacher)
            return f"Distillation closed {closed:.0f}% of the student’s distance to its teacher"
        return "The student has caught up with its teacher"
    if after <= before:
        return "Distillation did not raise the student’s score"
    if after >= teacher:
        return "The student has caught up with its teacher"
    return f"The student reaches {100 * after / teacher:.0f}% of its teacher’s score"


@dataclass(frozen=True)
class Bar:
    """Scores along one axis: texts to print and places in per cent of the axis."""

    metric: str
    text: Mapping[str, str]
    place: Mapping[str, float]


def hero(summary: Summary) -> Bar:
    """The headline metric of teacher, student before and student after on a common axis from 0."""
    metric = summary.headline_metric
    values = {model: summary.scores[model][metric] for model in MODELS}
    full = 100.0 if formatting.is_percentage(metric) else 1.05 * max(1e-12, *values.values())
    return Bar(
        metric=metric,
        text={model: formatting.score(metric, value) for model, value in values.items()},
        place={model: round(100 * min(1.0, max(0.0, value / full)), 2) for model, value in values.items()},
    )


@dataclass(frozen=True)
class Fact:
    """A figure of the headline: what it is, the figure, and what it is made of."""

    name: str
    value: str
    detail: str


def facts(summary: Summary) -> list[Fact]:
    """Size, speed, memory and time, as far as the run recorded them."""
    found = []
    size, speed = summary.parameters, summary.images_per_second
    if size.get("teacher") and size.get("student"):
        detail = f"{formatting.count(size['student'])} of {formatting.count(size['teacher'])} parameters"
        found.append(Fact("smaller", formatting.factor(size["teacher"] / size["student"]), detail))
    if speed.get("teacher") and speed.get("student"):
        detail = f"{speed['student']:.0f} against {speed['teacher']:.0f} images a second, in turns"
        found.append(Fact("faster", formatting.factor(speed["student"] / speed["teacher"]), detail))
    if math.isfinite(summary.peak_mib):
        found.append(Fact("peak memory", formatting.memory(summary.peak_mib), "of the whole run"))
    if math.isfinite(summary.seconds):
        found.append(Fact("wall time", formatting.duration(summary.seconds), "of the whole run"))
    return found


def _pace(rounds: Sequence[Round], total: int) -> list[Fact]:
    """How far a run is, how fast it goes, and what the last round brought."""
    if not rounds:
        return []
    last = rounds[-1]
    left = last.seconds / last.round * (total - last.round)
    return [
        Fact("left", formatting.duration(max(0.0, left)), f"after {formatting.duration(last.seconds)}"),
        Fact("steps a second", formatting.plain(last.steps_per_second), f"{last.step} steps so far"),
        Fact("reward of the last round", formatting.plain(last.reward), formatting.spelled(last.chosen)),
        Fact("task loss", formatting.plain(last.losses.get("task", math.nan)), "mean of the last round"),
    ]


@dataclass(frozen=True)
class ScoreRow:
    """A metric of the score table; `closed` is the share of the gap to the teacher that distillation closed."""

    metric: str
    text: Mapping[str, str]
    closed: str


def score_table(summary: Summary) -> list[ScoreRow]:
    """Every metric of every model, the headline metric first."""
    names = dict.fromkeys([summary.headline_metric, *(name for scores in summary.scores.values() for name in scores)])
    rows = []
    for name in names:
        values = {model: scores[name] for model, scores in summary.scores.items() if name in scores}
        rows.append(
            ScoreRow(
                metric=formatting.spelled(name),
                text={model: formatting.score(name, values.get(model)) for model in summary.scores},
                closed=_gap_closed(values),
            )
        )
    return rows


def _gap_closed(values: Mapping[str, float]) -> str:
    """The share of the teacher's lead that is gone; says nothing where the teacher hardly led."""
    if len(values) < 3 or not all(map(math.isfinite, values.values())):
        return formatting.ABSENT
    gap = values["teacher"] - values["before"]
    if abs(gap) <= 0.01 * max(abs(values["teacher"]), abs(values["before"])):
        return formatting.ABSENT
    return f"{100 * (values['after'] - values['before']) / gap:.0f}%".replace("-", "−")


@dataclass(frozen=True)
class ArmRow:
    """How an arm fared: rounds it was chosen for, its mean reward, and what the bandit believed of it at the end."""

    name: str
    modules: tuple[str, ...]
    rounds: int
    share: str
    reward: str
    posterior: str


def arm_table(rounds: Sequence[Round]) -> list[ArmRow]:
    """A row an arm; the table is also the legend of the timeline."""
    rows = []
    for arm in plots.arms_of(rounds):
        own = [r.reward for r in rounds if r.chosen == arm]
        paid = [reward for reward in own if math.isfinite(reward)]
        mean, std = rounds[-1].mean.get(arm), rounds[-1].std.get(arm)
        rows.append(
            ArmRow(
                name=arm,
                modules=tuple(arm.split("+")),
                rounds=len(own),
                share=f"{100 * len(own) / len(rounds):.0f}%",
                reward=formatting.plain(sum(paid) / len(paid)) if paid else formatting.ABSENT,
                posterior=_posterior(mean, std, len(own)),
            )
        )
    return rows


def _posterior(mean: float | None, std: float | None, rounds: int) -> str:
    """A single round tells nothing of how far an arm's rewards spread."""
    if mean is None or std is None:
        return formatting.ABSENT
    spread = f"±\N{NO-BREAK SPACE}{formatting.plain(std)}" if rounds > 1 else "(one round)"
    return f"{formatting.plain(mean)} {spread}"


def _timeline_label(rounds: Sequence[Round]) -> str:
    chosen = ", ".join(f"{formatting.spelled(row.name)} {row.rounds}" for row in arm_table(rounds))
    weighed = ", ".join(f"{part} {formatting.plain(weight)}" for part, weight in rounds[-1].weights.items())
    at_last = f" Weights in the last: {weighed}." if plots.weights_changed(rounds) else ""
    return f"Modules, weights, posterior and reward over {len(rounds)} rounds. Rounds per arm: {chosen}.{at_last}"


@dataclass(frozen=True)
class Heat:
    """The heat map with the two ends of its colour scale."""

    plot: Markup
    floor: str
    rises: bool


def _heat(rounds: Sequence[Round]) -> Heat | None:
    relative = plots.relative_losses(rounds)
    if len(rounds) < 2 or not relative:
        return None
    ends = {name: values[-1] for name, values in relative.items() if math.isfinite(values[-1])}
    label = "Probe losses at the end relative to the first round: " + ", ".join(
        f"{name} {value:.2f}" for name, value in ends.items()
    )
    return Heat(
        plot=inline(lambda layout: plots.heat_map(rounds, layout), "heat", label),
        floor=f"{formatting.plain(plots.heat_floor(relative))}×",
        rises=any((values > 1).any() for values in relative.values()),
    )


def _curves(rounds: Sequence[Round], summary: Summary) -> Markup | None:
    panels = plots.curve_panels(rounds, summary)
    if not panels:
        return None
    label = "Learning curves over optimiser steps: " + ", ".join(map(formatting.spelled, panels))
    return inline(lambda layout: plots.learning_curves(rounds, summary, layout), "curves", label)


@dataclass(frozen=True)
class SampleGroup:
    """Samples with the same fate."""

    title: str
    explanation: str
    samples: tuple[Sample, ...]


def sample_groups(samples: Sequence[Sample]) -> list[SampleGroup]:
    """Changed for the better, for the worse, right all along, wrong still; empty groups are left out."""
    fates = (
        ("Changed by distillation", "wrong before, right after", False, True),
        ("Right", "before and after", True, True),
        ("Wrong", "before and after", False, False),
        ("Lost by distillation", "right before, wrong after", True, False),
    )
    groups = []
    for title, explanation, before, after in fates:
        own = tuple(s for s in samples if s.correct["before"] == before and s.correct["after"] == after)
        if own:
            groups.append(SampleGroup(title, explanation, own))
    return groups


@dataclass(frozen=True)
class Attention:
    """The image a caption was read off, and the same image lit by each word's attention."""

    image: str
    caption: str
    words: Sequence[tuple[str, str]]


def _attention(run: Run) -> Attention | None:
    if run.cross_attention is None:
        return None
    return Attention(
        image=images.data_uri(run.cross_attention.image),
        caption=" ".join(run.cross_attention.caption),
        words=images.spotlights(run.cross_attention),
    )
