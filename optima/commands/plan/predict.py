"""From what a step needs to the time it may take on a GPU and the batch that may fit: predictions, not measurements."""

from typing import NamedTuple

from optima.commands.options import PlanConfig
from optima.commands.plan.needs import Needs

HEADROOM = 1.1
"""Memory that a step takes on a GPU beside its tensors, as a factor; our assumption."""


class Gpu(NamedTuple):
    """Makers' figures. memory: GB. bf16, fp32: dense 10**12 operations a second. bandwidth: 10**12 bytes a second."""

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float


GPUS = (
    Gpu("A100 SXM 80 GB", 80, 312, 19.5, 2.04),
    Gpu("H100 SXM 80 GB", 80, 989, 67, 3.35),
    Gpu("B200 180 GB", 180, 2250, 75, 8.0),
)


def predicted_seconds(needs: Needs, gpu: Gpu, config: PlanConfig) -> float:
    """A prediction: the operations at the assumed share of the peak, then AdamW at four fifths of the bandwidth.

    AdamW reads weight, gradient and two moments and writes all but the gradient, four bytes each.
    """
    rate = (gpu.fp32 if config.engine.precision == "fp32" else gpu.bf16) * 1e12 * config.utilisation
    trained = needs.student_parameters + needs.projection_parameters
    return needs.operations / rate + 28 * trained / (0.8 * gpu.bandwidth * 1e12)


def largest_batch(needs: Needs, batch_size: int, memory: float) -> int:
    """About the most items a batch that fit `memory` (GB): what is not resident is taken to grow with the batch.

    0 if the held probe batch alone does not fit.
    """
    room = memory * 1e9 / HEADROOM
    if needs.probe_peak > room:
        return 0
    each = max(1, needs.step_peak - needs.resident + needs.kept) / batch_size
    return max(0, int((room - needs.resident - needs.gradients) / each))
