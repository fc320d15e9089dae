"""From what a step needs to the time it may take on a chip and the batch that may fit: estimates, not measurements."""

from typing import NamedTuple

from optima.commands.distill_hf.config import PlanHfConfig
from optima.commands.options import PlanConfig
from optima.commands.plan.needs import Needs

Planned = PlanConfig | PlanHfConfig
"""What can be planned."""

HEADROOM = 1.1
"""Memory that a step takes on a GPU beside its tensors, as a factor; our assumption."""

OF_BANDWIDTH = 0.8
"""Share of the memory's bandwidth that the optimiser is assumed to reach."""


class Gpu(NamedTuple):
    """Makers' figures. memory: GB. bf16, fp32: dense 10**12 operations a second. bandwidth: 10**12 bytes a second.

    nvlink: 10**9 bytes a second that a GPU can send to others of its node, and receive as many.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    nvlink: float


GPUS = {
    "A100": Gpu("A100 SXM 80 GB", 80, 312, 19.5, 2.04, 300),
    "H100": Gpu("H100 SXM 80 GB", 80, 989, 67, 3.35, 450),
    "B200": Gpu("B200 180 GB", 180, 2250, 75, 8.0, 900),
}


class Rates(NamedTuple):
    """What a chip is assumed to do in a second: `arithmetic` operations, `traffic` bytes of its memory."""

    arithmetic: float
    traffic: float


def rates_of(config: Planned, gpu: Gpu | None = None) -> Rates | None:
    """Of the GPU, or else of the configuration's chip; None if that is a CPU whose peak was not given.

    What config.peak and config.bandwidth say goes before the maker's figures of the chip, and of no other.
    """
    peak, bandwidth = 0.0, 0.0
    if gpu is None:
        gpu, peak, bandwidth = GPUS.get(config.chip), config.peak, config.bandwidth
    if gpu is not None:
        peak = peak or (gpu.fp32 if config.engine.precision == "fp32" else gpu.bf16)
        bandwidth = bandwidth or gpu.bandwidth
    if not peak:
        return None
    return Rates(peak * 1e12 * config.utilisation, bandwidth * 1e12 * OF_BANDWIDTH)


def step_seconds(operations: float, trained: int, rates: Rates) -> float:
    """An estimate: the operations, then AdamW on `trained` parameters.

    AdamW reads weight, gradient and two moments and writes all but the gradient, four bytes each. Where the memory's
    bandwidth is not known (0) that costs nothing.
    """
    return operations / rates.arithmetic + (28 * trained / rates.traffic if rates.traffic else 0.0)


def predicted_seconds(needs: Needs, rates: Rates) -> float:
    """An estimate of a step."""
    return step_seconds(needs.operations, needs.student_parameters + needs.projection_parameters, rates)


def predicted_hours(needs: Needs, config: Planned, seconds: float, items: int) -> float:
    """An estimate of all rounds, `seconds` a step of `items` items.

    rounds x (steps a round x seconds + the student's forward pass on the probe, as many operations an item as in a
    step, at the same rate). Start, evaluations, checkpoints and the looks at gradients come on top.
    """
    engine = config.engine
    probe = seconds * needs.student_operations / max(1.0, needs.operations) * config.probe_size / items
    return engine.rounds * (engine.steps_per_round * seconds + probe) / 3600


def duration(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def largest_batch(needs: Needs, batch_size: int, memory: float) -> int:
    """About the most items a batch that fit `memory` (GB): what is not resident is taken to grow with the batch.

    0 if the held probe batch alone does not fit.
    """
    room = memory * 1e9 / HEADROOM
    if needs.probe_peak > room:
        return 0
    each = max(1, needs.step_peak - needs.resident + needs.kept) / batch_size
    return max(0, int((room - needs.resident - needs.gradients) / each))
