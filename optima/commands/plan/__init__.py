"""What a distillation will need, before anyone rents a GPU: memory, arithmetic, and an estimated time a step."""

import dataclasses
import json
from typing import Any

from optima.commands.distill_hf.config import PlanHfConfig
from optima.commands.options import PlanConfig
from optima.commands.plan.advice import advise, fits
from optima.commands.plan.cluster_table import plan_cluster
from optima.commands.plan.finetune import plan_finetuning
from optima.commands.plan.job import read_job
from optima.commands.plan.needs import Needs
from optima.commands.plan.predict import (
    GPUS,
    HEADROOM,
    Planned,
    largest_batch,
    predicted_hours,
    predicted_seconds,
    rates_of,
)
from optima.commands.plan.tables import show
from optima.runs.config import told_in_a_line

__all__ = ["plan", "plan_hf"]


def plan(config: PlanConfig) -> None:
    """Prints what the distillation needs, on one GPU or on many, or its teacher's finetuning."""
    job = read_job(config)
    if config.stage == "finetune":
        plan_finetuning(job)
        return
    if config.gpus > 1:
        plan_cluster(job)
        return
    with told_in_a_line():
        needs = job.needs()
        advice = advise(config, lambda found: job._replace(config=found).needs(), needs)
    _show(config, job.names, f", {config.task}", needs, advice)


def plan_hf(config: PlanHfConfig) -> None:
    """Prints what the distillation of models of transformers needs, on one device."""
    from optima.commands.plan.transformers import measure_hf_needs

    with told_in_a_line():
        needs = measure_hf_needs(config)
        advice = advise(config, measure_hf_needs, needs)
    _show(config, (config.teacher, config.student), "", needs, advice)


def _show(config: Planned, names: tuple[str, str], task: str, needs: Needs, advice: list[str]) -> None:
    teacher, student = names
    if config.json:
        figures = {"teacher": teacher, "student": student} | _figures(config, needs, advice)
        print(json.dumps(figures, indent=1, default=str))
    else:
        show(config, f"{teacher} -> {student}{task}", needs, advice)


def _figures(config: Planned, needs: Needs, advice: list[str]) -> dict[str, Any]:
    rates = rates_of(config)
    seconds = None if rates is None else predicted_seconds(needs, rates)
    items = config.batch_size * config.engine.accumulate
    predicted = {}
    for gpu in GPUS.values():
        known = rates_of(config, gpu)
        assert known is not None  # a maker's
        predicted[gpu.name] = {
            "seconds": predicted_seconds(needs, known),
            "largest_batch": largest_batch(needs, config.batch_size, gpu.memory),
        }
    return {
        "config": dataclasses.asdict(config),
        "needs": dataclasses.asdict(needs) | {"peak": needs.peak},
        "fits": fits(config, needs),
        "headroom": HEADROOM,
        "advice": advice,
        "predicted": predicted,
        "seconds": seconds,
        "hours": None if seconds is None else predicted_hours(needs, config, seconds, items),
    }
