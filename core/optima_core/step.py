"""One optimiser step: teacher forward, student forward, losses, backward, clipping, update, schedule, average.

It knows nothing of rounds, bandits and records. Which modules are distilled it is told by their gates: none (None)
where the host knows that a module is distilled, a tensor where only the device knows; what is not named is not tapped.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from optima_core.average import RunningAverage
from optima_core.compilation import compile_layers, layers_as_graphs, told_in_a_line
from optima_core.config import DistillerConfig
from optima_core.learner import Learner
from optima_core.modules import ModulePair
from optima_core.objective import Forward, Gates, Losses, LossVector, Objective, as_vector
from optima_core.optimiser import clip_gradients, make_optimiser, still_behind_gates
from optima_core.parallel import Ranks
from optima_core.precision import arithmetic, make_scaler
from optima_core.taps import WantedTaps

Batch = TypeVar("Batch")
ModelForward = Callable[[Batch, WantedTaps], Forward]
"""(batch, wanted taps) -> what the model shows the objective."""


class Step(Generic[Batch]):
    """Everything that a step needs: both models, objective, optimiser, schedule, scaler, running average.

    Args:
        student, student_forward, teacher_forward, modules: As `Distiller` takes them.
        config: Objective, optimiser, accumulation, precision, compilation and average are followed.
        ranks: The processes of the run.
    """

    def __init__(
        self,
        student: nn.Module,
        student_forward: ModelForward[Batch],
        teacher_forward: ModelForward[Batch],
        modules: Sequence[ModulePair],
        config: DistillerConfig,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.student = student
        self.teacher_forward = teacher_forward
        self.names = tuple(pair.name for pair in modules)
        self.device = next(student.parameters()).device
        self.objective = Objective(modules, config.objective, self.ranks.weigh if self.ranks.count > 1 else None)
        if self.device.type != "cpu":
            self.objective.to(self.device)
        self.learner = Learner(student, student_forward, self.objective)
        self.ranks.align(student)
        # Of whole weights, and sharded as the student is.
        self.average = RunningAverage(student, config.ema) if config.ema else None
        if self.average is not None:
            self.ranks.shard(self.average.module)
        layered = config.compile and self.ranks.count > 1
        if layered:
            compile_layers(student)
        self._learn = self.ranks.wrap(self.learner)
        self.trained = [*student.parameters(), *self.objective.parameters()]
        self.optimiser, self.schedule = make_optimiser(
            self.trained, config.optimiser, config.rounds * config.steps_per_round
        )
        self.scaler = make_scaler(config.precision, self.device)
        whole = config.compile and not layered
        self._compute = torch.compile(self.compute, fullgraph=True) if whole else self.compute
        self._graphs = layers_as_graphs if layered else told_in_a_line if whole else contextlib.nullcontext

    def run(self, batches: Iterable[Batch], gates: Gates) -> LossVector:
        """One step on the next `accumulate` batches, and no more; returns their mean losses. The host reads nothing."""
        losses = self.learn(batches, gates)
        self.advance()
        return losses

    def learn(self, batches: Iterable[Batch], gates: Gates) -> LossVector:
        """The device's part of a step: gradients and update."""
        parts = self.config.accumulate
        found: list[LossVector] = []
        for i, batch in zip(range(parts), batches, strict=False):
            with self.ranks.exchange(self._learn, last=i + 1 == parts):
                losses = self.losses(batch, gates)
                self.backward(losses)
            found.append(as_vector(losses))
        self.update(gates)
        mean = found[0].values if parts == 1 else torch.stack([part.values for part in found]).mean(dim=0)
        return LossVector(found[0].terms, self.ranks.mean(mean))

    def losses(self, batch: Batch, gates: Gates) -> Losses:
        """The losses of a batch, with a graph for `backward`."""
        with self.arithmetic(), self._graphs():
            return self._compute(batch, gates)

    def compute(self, batch: Batch, gates: Gates) -> Losses:
        """Both models and the losses: what `compile` makes one graph of in a process on its own."""
        wanted, wanted_of_teacher = self.objective.wanted(tuple(gates))
        with torch.no_grad():
            teacher = self.teacher_forward(batch, wanted_of_teacher)
        losses: Losses = self._learn(batch, wanted, teacher, gates)
        return losses

    def backward(self, losses: Losses) -> Tensor:
        """Adds a batch's share to the gradients of the step, and returns its total loss."""
        total = self.objective.total(losses) / self.config.accumulate
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        return total.detach()

    def update(self, gates: Gates) -> None:
        """Clips the gradients, moves what they belong to, and forgets them."""
        self.scaler.unscale_(self.optimiser)
        clip_gradients(self.trained, self.config.optimiser.clip)
        gated = [
            (gate, tuple(self.objective.projections[name].parameters()))
            for name, gate in gates.items()
            if gate is not None
        ]
        with still_behind_gates(self.optimiser, gated):
            self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)

    def advance(self) -> None:
        """The host's part of a step: the learning rate of the next one; and the running average."""
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.student)

    def teach(self, batch: Batch, modules: Sequence[str]) -> Forward:
        """What the teacher shows of a batch."""
        _, wanted = self.objective.wanted(modules)
        with torch.no_grad(), self.arithmetic():
            return self.teacher_forward(batch, wanted)

    def measure(self, batch: Batch, taught: Forward) -> LossVector:
        """The losses of a batch for all modules: without dropout, and without learning, running statistics included."""
        wanted, _ = self.objective.wanted(self.names)
        training = [module for module in self.student.modules() if module.training]
        self.student.eval()
        with torch.no_grad(), self.arithmetic():
            found = as_vector(self._learn(batch, wanted, taught, dict.fromkeys(self.names)))
        for module in training:
            module.training = True
        return LossVector(found.terms, self.ranks.mean(found.values))

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Around the forward passes and losses."""
        return arithmetic(self.config.precision, self.device)
