"""What to change so that a step fits."""

import dataclasses
from collections.abc import Callable
from typing import Any

from optima.commands.plan.needs import Needs
from optima.commands.plan.predict import HEADROOM, Planned, largest_batch

GIB = 2**30
FEW = 16
"""Items of a smaller probe batch, as advised where memory is short."""


def fits(config: Planned, needs: Needs) -> bool:
    """Whether the step fits the memory that was named, headroom included."""
    return needs.peak * HEADROOM <= config.memory * 1e9


def advise(config: Planned, measure: Callable[[Any], Needs], needs: Needs) -> list[str]:
    """Ways to make the step fit, what costs least time first; empty if it fits.

    measure: what a step needs, with another configuration.

    bf16 is presumed in what follows it, and so are fewer probed items where the probe alone does not fit.
    """
    if fits(config, needs):
        return []
    advice = []

    def changed(**changes: Any) -> tuple[Planned, Needs]:
        found = dataclasses.replace(config, **changes)
        return found, measure(found)

    if config.engine.precision == "fp32":
        config, needs = changed(engine=dataclasses.replace(config.engine, precision="bf16"))
        advice.append(f"--engine.precision bf16: peak {needs.peak / GIB:.3g} GiB, and faster")
        if fits(config, needs):
            return advice
    if config.probe_size > FEW:
        fewer, its_needs = changed(probe_size=FEW)
        advice.append(f"--probe_size {FEW}: peak {its_needs.peak / GIB:.3g} GiB, no more time, but noisier rewards")
        if not largest_batch(needs, config.batch_size, config.memory):
            config, needs = fewer, its_needs
            if fits(config, needs):
                return advice
    parts = _in_parts(config, needs)
    if parts:
        advice.append(f"{parts}: the step in parts, as many operations")
    if not config.recompute:
        again, its_needs = changed(recompute=True)
        smaller = "" if fits(again, its_needs) else _in_parts(again, its_needs)
        if fits(again, its_needs) or (smaller and not parts):
            more = its_needs.operations / needs.operations - 1
            peak = "" if smaller else f"peak {its_needs.peak / GIB:.3g} GiB, "
            options = f"--recompute {smaller}".strip()
            advice.append(f"{options}: {peak}{100 * more:.0f} % more operations")
    if not any("accumulate" in line or "recompute" in line for line in advice):
        advice.append("nothing else helps here: a smaller student or teacher, or a GPU with more memory")
    return advice


def _in_parts(config: Planned, needs: Needs) -> str:
    """The options that cut a step's batch into equal parts that fit; empty if there are none."""
    size = config.batch_size
    fitting = [part for part in range(1, min(size, largest_batch(needs, size, config.memory) + 1)) if size % part == 0]
    if not fitting:
        return ""
    return f"--batch_size {fitting[-1]} --engine.accumulate {size // fitting[-1] * config.engine.accumulate}"
