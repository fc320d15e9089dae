"""The plan of a distillation on many GPUs."""

import dataclasses
import json

from rich.console import Console

from optima.commands.console import make_console, make_table
from optima.commands.options import PlanConfig
from optima.commands.plan.advice import GIB
from optima.commands.plan.cluster import ClusterNeeds, cluster_needs, layout_of
from optima.commands.plan.job import Job
from optima.commands.plan.predict import GPUS, HEADROOM, OF_BANDWIDTH, duration
from optima.commands.plan.tables import show_memory, show_work
from optima.runs.config import told_in_a_line

GB = 1e9


def plan_cluster(job: Job) -> None:
    """Prints what a step needs of each GPU and of what connects them. Raises OptimaError if they cannot share it."""
    config, alone = job.config, job.of_one_gpu()
    layout_of(config)  # what does not divide is told at once
    with told_in_a_line():
        needs = alone.needs()
    found = cluster_needs(config, needs, job.student, job.teacher)
    fit = found.memory * HEADROOM <= config.memory * GB
    if config.json:
        more = {"bound": found.bound, "fastest": found.fastest, "slowest": found.slowest, "fits": fit}
        figures = {"needs": dataclasses.asdict(needs), "cluster": dataclasses.asdict(found) | more}
        print(json.dumps(figures, indent=1))
        return
    console = make_console()
    models = f"on one of {config.gpus} GPUs, unsharded: {' -> '.join(job.names)}, {config.task}"
    show_memory(console, alone.config, models, needs)
    show_work(console, needs)
    _show(console, config, found)
    if fit:
        console.print(f"Fits {config.memory:g} GB.", style="bold")
    else:
        console.print(
            f"Does not fit {config.memory:g} GB: more engine.accumulate and a smaller batch_size, --recompute, or "
            "parameters sharded over more GPUs take less.",
            style="bold",
        )


def _show(console: Console, config: PlanConfig, found: ClusterNeeds) -> None:
    layout = found.layout
    title = (
        f"Estimates: {layout.gpus} {config.chip} on {layout.nodes} machines, {config.parallel}, "
        f"{layout.groups} x {layout.shard} GPUs"
    )
    table = make_table("of one GPU and step", "", "ms", title=title, left=2)
    for name, told in _amounts(config, found).items():
        bound = "  <- bound" if name == found.bound else ""
        table.add_row(name, told, f"{1000 * found.seconds[name]:.2f}{bound}")
    console.print(table)
    for line in _lines(config, found):
        console.print(line, soft_wrap=True)


def _amounts(config: PlanConfig, found: ClusterNeeds) -> dict[str, str]:
    cluster, sent = config.cluster, found.sent
    nvlink = cluster.nvlink or GPUS[config.chip].nvlink
    reached, images = f"{100 * cluster.reached:.0f} %", found.images / found.layout.gpus
    return {
        "compute": f"{100 * config.utilisation:.0f} % of the peak",
        "memory": f"{100 * OF_BANDWIDTH:.0f} % of the bandwidth",
        "NVLink": f"sends {sent.nvlink / GB:.3g} GB at {reached} of {nvlink:g} GB/s",
        "network": f"sends {sent.network / GB:.3g} GB at {reached} of {cluster.network:g} GB/s",
        "loader": f"{images:.0f} images, {cluster.cores} cores x {cluster.images_a_core:g} a second",
    }


def _lines(config: PlanConfig, found: ClusterNeeds) -> list[str]:
    engine, cluster, layout = config.engine, config.cluster, found.layout
    steps = engine.rounds * engine.steps_per_round
    least, most = (duration(steps * seconds) for seconds in (found.fastest, found.slowest))
    writers = layout.in_a_group[0]
    saves = -(-engine.rounds // config.checkpoint_every)
    images, loaded = found.images_a_second, found.images_a_second * cluster.image_bytes / GB
    return [
        f"Bound by {found.bound}. A step takes {1000 * found.fastest:.1f} ms if all else hides behind it, "
        f"{1000 * found.slowest:.1f} ms if nothing does; {steps} steps {least} to {most}, "
        "without start, probes, evaluations and checkpoints.",
        f"Memory of a GPU: {found.memory / GIB:.1f} GiB at the peak.",
        f"Loaders: {images:.0f} images and {loaded:.2g} GB a second in all, {images / layout.nodes:.0f} and "
        f"{loaded / layout.nodes:.2g} a machine, with files of {cluster.image_bytes} bytes.",
        f"A checkpoint: {found.checkpoint / GB:.3g} GB, {config.keep} kept; {found.checkpoint_seconds:.2g} s to write, "
        f"at {cluster.storage:g} GB/s of {writers} machine{'s' if writers > 1 else ''}, {saves} times.",
        "Counted: collectives in rings, of 4 bytes a parameter or gradient; memory traffic of optimiser, weights and "
        "activations. Not counted: latency, and the host's launches, which bind where a GPU has few items. "
        "optima/commands/plan/cluster.py has the formulas, --cluster.* the rates.",
    ]
