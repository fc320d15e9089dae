"""All that is trained, as one module."""

from collections.abc import Callable
from typing import Any

from torch import nn

from optima_core.objective import Forward, Gates, Losses, Objective
from optima_core.taps import WantedTaps


class Learner(nn.Module):
    """Student and projections; its forward gives the losses of a step.

    DDP and FSDP act where a module's forward begins and ends. So everything that is trained is used inside this one's:
    the projections, and a head whose weight the prediction loss reads, as well as the student's layers.
    """

    def __init__(
        self, student: nn.Module, student_forward: Callable[[Any, WantedTaps], Forward], objective: Objective
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        # In a tuple, for it may be the student again, which must not be registered twice.
        self._student_forward = (student_forward,)

    def forward(self, batch: Any, wanted: WantedTaps, teacher: Forward, gates: Gates) -> Losses:
        """The losses of `Objective.forward` for a batch, the student's `wanted` taps and the teacher's output."""
        losses: Losses = self.objective(self._student_forward[0](batch, wanted), teacher, gates)
        return losses
