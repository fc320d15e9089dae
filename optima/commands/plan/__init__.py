"""What a distillation will need, before anyone rents a GPU: memory, arithmetic, and a predicted time a step."""

import dataclasses
import json
from typing import Any

from optima.commands.console import make_console, make_table
from optima.commands.options import PlanConfig
from optima.commands.plan.advice import GIB, advise, fits
from optima.commands.plan.job import read_job
from optima.commands.plan.needs import Needs
from optima.commands.plan.predict import GPUS, HEADROOM, largest_batch, predicted_seconds
from optima.runs.config import told_in_a_line

__all__ = ["plan"]


def plan(config: PlanConfig) -> None:
    """Prints what the distillation needs."""
    job = read_job(config)
    with told_in_a_line():
        needs = job.needs()
        advice = advise(job, needs)
    teacher, student = job.names
    if config.json:
        figures = {"teacher": teacher, "student": student} | _figures(config, needs, advice)
        print(json.dumps(figures, indent=1, default=str))
    else:
        _show(config, f"{teacher} -> {student}", needs, advice)


def _figures(config: PlanConfig, needs: Needs, advice: list[str]) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "needs": dataclasses.asdict(needs) | {"peak": needs.peak},
        "fits": fits(config, needs),
        "headroom": HEADROOM,
        "advice": advice,
        "predicted": {
            gpu.name: {
                "seconds": predicted_seconds(needs, gpu, config),
                "largest_batch": largest_batch(needs, config.batch_size, gpu.memory),
            }
            for gpu in GPUS
        },
    }


def _show(config: PlanConfig, models: str, needs: Needs, advice: list[str]) -> None:
    console = make_console()
    engine = config.engine
    title = (
        f"{models}, {config.task}, batch {config.batch_size}"
        f"{f' x {engine.accumulate}' if engine.accumulate > 1 else ''}, {engine.precision}"
        f"{', activations recomputed' if config.recompute else ''}"
    )
    memory = make_table("memory of a step, all modules tapped", "GiB", "", title=title)
    memory.columns[-1].justify = "left"
    rows = (
        ("weights", needs.weights, f"teacher {needs.teacher_parameters / 1e6:.1f} M, student "
         f"{needs.student_parameters / 1e6:.1f} M, projections {needs.projection_parameters / 1e6:.1f} M"),
        ("gradients", needs.gradients, "student and projections"),
        ("optimiser", needs.optimiser, "AdamW's two moments"),
        ("running average", needs.average, ""),
        ("held probe batch", needs.probe, f"{config.probe_size} items, as the teacher shows them"),
        ("activations", needs.activations, f"{needs.activations / config.batch_size / 2**20:.0f} MiB an item"),
        ("kept by CUDA graphs", needs.kept, "beside the probe, and beside the first steps of another arm"),
    )  # fmt: skip
    for name, size, remark in rows:
        if size:
            memory.add_row(name, f"{size / GIB:.2f}", remark)
    memory.add_row("peak of the probe", f"{needs.probe_peak / GIB:.2f}", "the most alive at once, whatever the batch")
    memory.add_row("peak of a step", f"{needs.step_peak / GIB:.2f}", "the most alive at once")
    console.print(memory)

    work = make_table("10^12 operations a step", "teacher", "student", "losses", "backward", "all")
    parts = (
        needs.teacher_operations,
        needs.student_operations,
        needs.loss_operations,
        needs.backward_operations,
        needs.operations,
    )
    work.add_row("", *(f"{part / 1e12:.2f}" for part in parts))
    console.print(work)

    headings = ("GPU", "ms a step", "items a second", "largest batch, about")
    speed = make_table(*headings, title="Predictions, not measurements")
    for gpu in GPUS:
        seconds = predicted_seconds(needs, gpu, config)
        items = config.batch_size * engine.accumulate / seconds
        speed.add_row(
            gpu.name, f"{1000 * seconds:.0f}", f"{items:.0f}", str(largest_batch(needs, config.batch_size, gpu.memory))
        )
    console.print(speed)
    peak = "fp32" if engine.precision == "fp32" else "dense 16-bit"
    console.print(
        f"Assumed: {100 * config.utilisation:.0f} % of the makers' {peak} peak, 80 % of the bandwidth in the "
        f"optimiser, {100 * (HEADROOM - 1):.0f} % more memory than the tensors take.",
    )
    if advice:
        console.print(f"Does not fit {config.memory:g} GB. What to change:", style="bold")
        for line in advice:
            console.print(f"  {line}", soft_wrap=True)
    else:
        console.print(f"Fits {config.memory:g} GB.", style="bold")
