"""What the command `plan` takes."""

import math
from dataclasses import dataclass

from optima.runs.config import DistillConfig


@dataclass(frozen=True)
class PlanConfig(DistillConfig):
    """A distillation on one GPU: the options, recipes and resolved config.yaml of `distill`, as they are.

    No data set needs to be there, and no weights: `teacher` and `student` may also be names of presets, whose sizes
    count. Of several GPUs give the share of one as batch_size and probe_size. What bears on neither memory nor the
    time of a step has no effect.

    Attributes:
        memory: Memory of the GPU that the step must fit, GB.
        utilisation: Share of a GPU's peak arithmetic that is assumed to be reached, in (0, 1].
        json: Print the figures as JSON instead of tables.
    """

    memory: float = 80.0
    utilisation: float = 0.4
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.memory < math.inf:
            raise ValueError(f"memory must be a finite number of GB above 0, got {self.memory}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation must be in (0, 1], got {self.utilisation}")
