"""The plan of a teacher's finetuning."""

import dataclasses
import json

from optima.commands.console import make_console, make_table
from optima.commands.plan.advice import GIB
from optima.commands.plan.job import Job
from optima.commands.plan.predict import HEADROOM, rates_of, step_seconds


def plan_finetuning(job: Job) -> None:
    """Prints what a step of `finetune` needs on the chip."""
    config, needs = job.config, job.training_needs()
    rates = rates_of(config)
    seconds = None if rates is None else step_seconds(needs.operations, needs.parameters, rates)
    fit = needs.peak * HEADROOM <= config.memory * 1e9
    if config.json:
        figures = {"teacher": job.names[0], "needs": dataclasses.asdict(needs), "fits": fit, "seconds": seconds}
        print(json.dumps(figures, indent=1))
        return
    console = make_console()
    recomputed = ", activations recomputed" if config.recompute else ""
    title = (
        f"finetuning {job.names[0]}, {config.task}, batch {config.batch_size}, {config.engine.precision}{recomputed}"
    )
    table = make_table("memory of a step", "GiB", "", title=title)
    table.columns[-1].justify = "left"
    for name, size, remark in (
        ("weights", needs.weights, f"{needs.parameters / 1e6:.1f} M"),
        ("gradients", needs.gradients, ""),
        ("optimiser", needs.optimiser, "AdamW's two moments"),
        ("activations", needs.activations, "" if config.engine.precision == "fp32" else "and the weights in 16 bits"),
        ("peak of a step", needs.peak, "the most alive at once"),
    ):
        table.add_row(name, f"{size / GIB:.2f}", remark)
    console.print(table)
    told = "not estimated: a CPU needs --peak" if seconds is None else f"{seconds:.3g} s on {config.chip}, estimated"
    console.print(f"{needs.operations / 1e12:.2f} x 10^12 operations a step, {told}.")
    if fit:
        console.print(f"Fits {config.memory:g} GB.", style="bold")
    else:
        console.print(
            f"Does not fit {config.memory:g} GB: a smaller --batch_size"
            f"{'' if config.recompute else ' or --recompute'} takes less.",
            style="bold",
        )
