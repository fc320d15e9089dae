"""The plan of a distillation as tables."""

from rich.console import Console

from optima.commands.console import make_console, make_table
from optima.commands.plan.advice import GIB
from optima.commands.plan.needs import Needs
from optima.commands.plan.predict import (
    GPUS,
    HEADROOM,
    OF_BANDWIDTH,
    Planned,
    duration,
    largest_batch,
    predicted_hours,
    predicted_seconds,
    rates_of,
)


def show(config: Planned, models: str, needs: Needs, advice: list[str]) -> None:
    """Prints memory, work, estimated times, and what to change if the step does not fit."""
    console = make_console()
    show_memory(console, config, models, needs)
    show_work(console, needs)
    _show_speed(console, config, needs)
    _show_hours(console, config, needs)
    if advice:
        console.print(f"Does not fit {config.memory:g} GB. What to change:", style="bold")
        for line in advice:
            console.print(f"  {line}", soft_wrap=True)
    else:
        console.print(f"Fits {config.memory:g} GB.", style="bold")


def show_memory(console: Console, config: Planned, models: str, needs: Needs) -> None:
    """Prints what a step's memory is made of."""
    engine = config.engine
    title = (
        f"{models}, batch {config.batch_size}"
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
        ("the next batch's teacher", needs.ahead, "run ahead on a CPU of two threads or more"),
        ("kept by CUDA graphs", needs.kept, "beside the probe, and beside the first steps of another arm"),
    )  # fmt: skip
    for name, size, remark in rows:
        if size:
            memory.add_row(name, f"{size / GIB:.2f}", remark)
    memory.add_row("peak of the probe", f"{needs.probe_peak / GIB:.2f}", "the most alive at once, whatever the batch")
    memory.add_row("peak of a step", f"{needs.step_peak / GIB:.2f}", "the most alive at once")
    console.print(memory)


def show_work(console: Console, needs: Needs) -> None:
    """Prints the operations of a step."""
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


def _show_speed(console: Console, config: Planned, needs: Needs) -> None:
    headings = ("GPU", "ms a step", "items a second", "largest batch, about")
    speed = make_table(*headings, title="Predictions, not measurements")
    for gpu in GPUS.values():
        rates = rates_of(config, gpu)
        assert rates is not None  # a maker's
        seconds = predicted_seconds(needs, rates)
        items = config.batch_size * config.engine.accumulate / seconds
        speed.add_row(
            gpu.name, f"{1000 * seconds:.0f}", f"{items:.0f}", str(largest_batch(needs, config.batch_size, gpu.memory))
        )
    console.print(speed)
    peak = "fp32" if config.engine.precision == "fp32" else "dense 16-bit"
    console.print(
        f"Assumed: {100 * config.utilisation:.0f} % of the makers' {peak} peak, {100 * OF_BANDWIDTH:.0f} % of the "
        f"bandwidth in the optimiser, {100 * (HEADROOM - 1):.0f} % more memory than the tensors take.",
    )


def _show_hours(console: Console, config: Planned, needs: Needs) -> None:
    engine, rates = config.engine, rates_of(config)
    if rates is None:
        console.print("Time on this CPU: give --peak, its 10^12 operations a second, to have it estimated.")
        return
    seconds = predicted_seconds(needs, rates)
    hours = predicted_hours(needs, config, seconds, config.batch_size * engine.accumulate)
    console.print(
        f"Estimate for {config.chip}: {engine.rounds} rounds x {engine.steps_per_round} steps x {seconds:.3g} s, and "
        f"the probes: {duration(3600 * hours)}, without start, evaluations and checkpoints.",
        soft_wrap=True,
    )
