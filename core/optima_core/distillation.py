"""All losses of a distillation as one module, for loops that are not ours: a Trainer, Accelerate, Lightning, a `for`.

    distillation = Distillation(student, student_forward, teacher_forward, pairs)
    optimiser = torch.optim.AdamW(distillation.parameters())
    distillation(batch)["loss"].backward()

Its parameters are the student's and the projections'; the teacher is no part of it, and is neither trained nor saved.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optima_core.balancer import Balancer
from optima_core.comparable import refuse_other_masks
from optima_core.config import ObjectiveConfig
from optima_core.modules import ModulePair
from optima_core.objective import Objective, as_vector
from optima_core.step import ModelForward


class Distillation(nn.Module):
    """Student and projections; its forward gives the losses of a batch.

    Args:
        student, student_forward, teacher_forward, modules: As `optima_core.Distiller` takes them.
        config: Weights and kinds of the losses.
        balancer: Who chooses the modules, by their names; observe held-out losses with it to end a round. None distils
            all modules at all times.

    With DDP and a balancer, projections that rest have no gradient: wrap with find_unused_parameters=True.
    """

    def __init__(
        self,
        student: nn.Module,
        student_forward: ModelForward[Any],
        teacher_forward: ModelForward[Any],
        modules: Sequence[ModulePair],
        config: ObjectiveConfig | None = None,
        balancer: Balancer | None = None,
    ) -> None:
        super().__init__()
        self.names = tuple(pair.name for pair in modules)
        if balancer is not None and set(balancer.names) != set(self.names):
            raise ValueError(f"the balancer must choose among {list(self.names)}, not {list(balancer.names)}")
        self.student = student
        self.objective = Objective(modules, config or ObjectiveConfig())
        self.objective.to(next(student.parameters()).device)
        self.balancer = balancer
        # In a tuple, for what is called may be a module, which must not be trained or saved as a part of this one.
        self._forwards = (student_forward, teacher_forward)
        self._masks_are_alike = False

    def forward(self, batch: Any = None, **named: Any) -> dict[str, Tensor]:
        """The total as "loss", and every loss without its weight and without a gradient, by its name in records.

        batch: what the forwards take; or else the keyword arguments are a dictionary for them. In eval mode all modules
            are compared, so that held-out losses of different rounds can be.

        Raises OptimaError if teacher and student cannot be compared.
        """
        given = named if batch is None else batch
        chosen = self.balancer.chosen() if self.training and self.balancer is not None else self.names
        wanted, wanted_of_teacher = self.objective.wanted(chosen)
        student_forward, teacher_forward = self._forwards
        with torch.no_grad():
            taught = teacher_forward(given, wanted_of_teacher)
        shown = student_forward(given, wanted)
        if self._masks_are_alike:
            losses = self.objective(shown, taught, dict.fromkeys(chosen))
        else:
            with self.objective.comparing_masks() as differing:
                losses = self.objective(shown, taught, dict.fromkeys(chosen))
            refuse_other_masks({where: float(share) for where, share in differing.items()})
            self._masks_are_alike = chosen == self.names or not differing
        vector = as_vector(losses)
        names = (term.name for term in vector.terms)
        return {"loss": self.objective.total(losses), **dict(zip(names, vector.values.unbind(), strict=True))}
