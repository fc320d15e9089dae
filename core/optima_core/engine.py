"""The engine: rounds of optimiser steps on the module that the bandit chose, and the reward that follows.

One round: the policy picks an arm, which is a strength for every module; for some steps the student learns with the
layer losses of the modules whose strength is above 0. In the round's first step the gradients of each module's
hidden-state and attention-map losses are held against that of the predictions: their norms are the unit of strength. At
the end the losses of a probe batch, held from the start, say how far everything fell: the round's reward.
Everything that decides anything is a tensor on the device. The host reads once a round which arm was chosen, and taps
that arm's modules alone; or, if asked to, nothing at all. Records it reads when they arrive.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor, nn

from optima_core.ahead import TeacherAhead
from optima_core.balance import GradientBalance, led_by_layers
from optima_core.bandit.arms import arm_strengths, belief_names, count_arms
from optima_core.checkpoint import Saved
from optima_core.comparable import refuse_other_masks
from optima_core.config import DistillerConfig
from optima_core.errors import OptimaError
from optima_core.graphs import CudaRecorder, ReplayedStep
from optima_core.modules import ModulePair
from optima_core.objective import Gates, LossVector
from optima_core.parallel import Ranks
from optima_core.pulls import Pull
from optima_core.records import PendingRecord, RoundRecord, Sent, Stopwatch
from optima_core.reward import RewardMeter
from optima_core.state import (
    copy_whole,
    load_random,
    load_trained,
    random_state,
    trained_state,
    trained_state_to_fill,
)
from optima_core.step import Batch, ModelForward, Part, Step
from optima_core.terms import LAYER_KINDS, LossKind, LossTerm


class _Choice:
    """What the policy chose for a round.

    arm: int64 [1]. strengths: float32 [modules]. after: the bandit's state once its round is counted.
    sent: the strengths on their way to the host, if it is to read them.
    """

    def __init__(self, arm: Tensor, strengths: Tensor, after: dict[str, Tensor], read: bool) -> None:
        self.arm, self.strengths, self.after = arm, strengths, after
        self.sent = Sent(strengths) if read else None


class Distiller(Generic[Batch]):
    """Distils a teacher into a student, module by module.

    Args:
        student: The module whose parameters are trained.
        student_forward: Runs the student on a batch and returns its losses' ingredients.
        teacher_forward: The same of the teacher; runs under no_grad. Put the teacher into eval mode beforehand. On a
            CPU it runs, as `load` does, in another thread while the student learns (`DistillerConfig.teacher_ahead`),
            but never between rounds.
        modules: The modules that can be distilled: the arms.
        load: Number of a batch, from 0 -> training batch; step s takes the batches from s * accumulate on. A pure
            function of the number, without torch's global random numbers, makes a resumed run equal an uninterrupted
            one. A later call must leave the batch as it is.
        probe: The held batch that rewards are measured on.
        config: See `DistillerConfig`.
        seed: Seed of the bandit's random numbers.
        ranks: The processes of the run (`optima_core.parallel.join_ranks`). Each gives `load` and `probe` that return
            its slice (`Ranks.share`) of the batch. With FSDP the student is sharded here, a teacher beforehand by
            `Ranks.shard`; with `compile` the student's layers are compiled here, a teacher's beforehand, first of all,
            by `optima_core.compilation.compile_layers`.

    Raises ValueError if an option of the policy does not fit the number of arms.
    """

    def __init__(
        self,
        student: nn.Module,
        student_forward: ModelForward[Batch],
        teacher_forward: ModelForward[Batch],
        modules: Sequence[ModulePair],
        load: Callable[[int], Batch],
        probe: Batch,
        config: DistillerConfig,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        _refuse_unshared(config, self.ranks)
        self._ahead = _make_ahead(student, teacher_forward, config, self.ranks)
        self.training: Step[Batch] = Step(
            student, student_forward, self._ahead or teacher_forward, modules, config, self.ranks
        )
        self.student = student
        self.load = load
        self.probe = probe
        self.device = self.training.device
        self.names = self.training.names
        self.objective = self.training.objective
        self.arms = config.bandit.arm_kind
        self.policy = config.bandit.make(count_arms(len(modules), self.arms))
        self.arm_names = belief_names(self.names, self.arms)
        self.meter = RewardMeter(config.reward)
        self.bandit = self.policy.init(batch=1, seed=seed, device=self.device)
        self.balance = GradientBalance(len(modules) * len(LAYER_KINDS))
        self.units = self.balance.init(self.device)
        self.pulls = torch.zeros(len(self.arm_names), dtype=torch.int64, device=self.device)
        self.round = 0
        self.step = 0
        # A graph that serves every arm taps all modules; then the host need not know the arm.
        self._reads_arm = config.read_arm and not (config.compile and self.ranks.count == 1)
        replays = config.cuda_graphs and self.device.type == "cuda"
        self._replayed = ReplayedStep(self.training, CudaRecorder(self.device)) if replays else None
        self._next: _Choice | None = None
        self._taught = self.training.teach(probe, self.names)
        with self.objective.comparing_masks() as self._differing:
            self.initial_probe = self.training.measure(probe, self._taught)
        terms = self.initial_probe.terms
        self._parts: tuple[Part, ...] = tuple(
            dict.fromkeys((term.module, term.kind) for term in terms if term.module is not None)
        )
        self._looks = config.balance == "gradient" and any(term.module is None for term in terms)
        self._kinds = torch.tensor([getattr(config.objective, kind) for kind in LAYER_KINDS], device=self.device)
        self._modules_of_terms = _modules_of(self.initial_probe.terms, self.names, self.device)
        self.reward = self.meter.init(self.initial_probe.values[None])
        if not self.ranks.first:
            # Dropout differs between slices of a batch; the first rank draws what a single process does.
            torch.manual_seed(torch.initial_seed() + self.ranks.rank)

    @property
    def result(self) -> nn.Module:
        """The student to score and to keep: its running average if `ema` asks for one, otherwise itself."""
        average = self.training.average
        return self.student if average is None else average.module

    def gather_result(self, copy: nn.Module) -> nn.Module:
        """`result`, of sharded parameters, written into an unsharded copy of the student; all ranks must call this."""
        copy_whole(self.training.learner, self.result, copy)
        return copy

    def run_round(self) -> RoundRecord:
        """One round, and what happened in it.

        Raises OptimaError, naming the loss term, if a loss became NaN or infinite; the state is then not worth saving.
        Also if student and teacher mask their attention differently, so that their maps cannot be compared.
        """
        return self.launch_round().result()

    def launch_round(self) -> PendingRecord:
        """One round. On a GPU it is queued, and the next one may be queued behind it.

        The host waits for the arm, which the round before ends by choosing; with `read_arm: false` for nothing. A loss
        that is not finite is noticed by the record's `result`, so ask for that before you save the state.
        """
        choice = self._next or self._choose()
        self.bandit = choice.after
        first = self.step * self.config.accumulate
        numbers = range(first, first + self.config.steps_per_round * self.config.accumulate)
        loaded: Iterator[Batch] = map(self.load, numbers)
        # Loaded while a GPU ends the round before, whose end tells the arm.
        loaded = itertools.chain([next(loaded)], loaded)
        gates = self._gates(choice)
        watch = Stopwatch(self.device)
        steps: list[LossVector] = []
        training = self.training if self._replayed is None else self._replayed
        agreement = torch.full_like(self.objective.strengths, math.nan)
        self.objective.strengths.copy_(choice.strengths[:, None] * self._units())
        with self._taught_ahead(loaded, gates) as batches:
            for i in range(self.config.steps_per_round):
                if i == 0 and self._looks:
                    parts = [part for part in self._parts if part[0] in gates]
                    steps.append(training.run_apart(batches, gates, parts, partial(self._weigh, choice, agreement)))
                else:
                    steps.append(training.run(batches, gates))
                if self.config.reward.source == "training":
                    self._observe(steps[-1], choice.strengths)
                self.step += 1
        watch.stop()
        probe = self.training.measure(self.probe, self._taught)
        if self.config.reward.source == "probe":
            reward, self.reward = self.meter.measure(self.reward, probe.values[None])
        else:
            reward, self.reward = self.meter.finish(self.reward)
        self.bandit = self.policy.update(self.bandit, choice.arm, reward)
        if self.arms == "strengths":
            self.pulls = self.pulls + (choice.strengths > 0)
        else:
            self.pulls = self.pulls.index_add(0, choice.arm % len(self.arm_names), torch.ones_like(choice.arm))
        self.round += 1
        self._next = self._choose()
        return self._send_record(choice, reward, agreement, steps, probe, watch, tuple(gates))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, torch's random numbers included.

        Holds references to live tensors: write it out, or copy it, before the next round. With several ranks all must
        call this; each has its own share of what is sharded, as DTensors, which `CheckpointStore` saves as they are.
        """
        training = self.training
        return {
            **trained_state(training.learner, training.optimiser),
            "schedule": training.schedule.state_dict(),
            "scaler": training.scaler.state_dict(),
            "ema": {} if training.average is None else training.average.state_dict(),
            "bandit": self.bandit,
            "reward": self.reward,
            "units": self.units,
            "random": random_state(self.ranks),
            "pulls": self.pulls,
            "round": self.round,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, for a distiller of the same configuration on the same ranks; see `restore`."""
        training = self.training
        load_trained(training.learner, training.optimiser, state)
        if training.average is not None:
            training.average.load_state_dict(state["ema"])
        training.schedule.load_state_dict(state["schedule"])
        training.scaler.load_state_dict(state["scaler"])
        self.bandit = {name: tensor.to(self.device) for name, tensor in state["bandit"].items()}
        self.reward = {name: tensor.to(self.device) for name, tensor in state["reward"].items()}
        self.units = {name: tensor.to(self.device) for name, tensor in state["units"].items()}
        load_random(state["random"], self.ranks)
        self.pulls = state["pulls"].to(self.device)
        self.round = state["round"]
        self.step = state["step"]
        self._next = None
        if self._replayed is not None:
            self._replayed.forget()

    def restore(self, saved: Saved) -> None:
        """Goes on from a `state_dict` in a checkpoint, whatever the number of ranks and the strategy that wrote it.

        All ranks must call this; each reads its share. The configuration must be the same.
        """
        training = self.training
        moved = saved.state["optimiser"].get("state", {})
        blank = trained_state_to_fill(training.learner, training.optimiser, moved)
        if training.average is not None:
            blank["ema"] = training.average.state_dict()
        self.load_state_dict(saved.read(blank))

    def _choose(self) -> _Choice:
        """The next round's arm, queued; a pure function of the bandit's state, which stays as it is."""
        arm, after = self.policy.select(self.bandit)
        return _Choice(arm, arm_strengths(arm, len(self.names), self.arms)[0], after, self._reads_arm)

    def _units(self) -> Tensor:
        """What a strength of 1 weighs, float32 [modules, 2]."""
        if not self._looks:
            return torch.ones_like(self.objective.strengths)
        units = self.balance.units(self.units).view_as(self.objective.strengths)
        config = self.config
        return units * led_by_layers(config.strength_first, config.strength_last, self.round, config.rounds)

    def _weigh(self, choice: _Choice, agreement: Tensor, name: str, kind: LossKind, pull: Pull) -> Tensor:
        """Takes in how a part pulls, and returns what its strength weighs, 0-d. One at strength 0 tells nothing."""
        module, column = self.names.index(name), LAYER_KINDS.index(kind)
        strength, part = choice.strengths[module], module * len(LAYER_KINDS) + column
        # The unit is that of the losses themselves: the objective's weight, which the pull has in it, multiplies it.
        ratio = pull.ratio * getattr(self.config.objective, kind)
        self.units = self.balance.observe(self.units, part, torch.where(strength > 0, ratio, 0.0))
        agreement[module, column].copy_(torch.where(strength > 0, pull.agreement, math.nan))
        return strength * self._units()[module, column]

    def _gates(self, choice: _Choice) -> Gates:
        """The modules to tap: those of the arm, without gates; all of them behind gates if the arm is not read."""
        if choice.sent is None:
            return dict(zip(self.names, (choice.strengths > 0).float().unbind(), strict=True))
        chosen = choice.sent.value().tolist()
        return {name: None for name, gate in zip(self.names, chosen, strict=True) if gate}

    def _taught_ahead(self, batches: Iterator[Batch], gates: Gates) -> AbstractContextManager[Iterator[Batch]]:
        """The batches of a round, shown to the teacher ahead of the student where that saves time."""
        if self._ahead is None:
            return contextlib.nullcontext(batches)
        _, wanted = self.objective.wanted(tuple(gates))
        return self._ahead.batches(batches, wanted)

    def _observe(self, found: LossVector, strengths: Tensor) -> None:
        """Hands a step's losses to the reward; those of modules that were not distilled count as not measured."""
        values = dict(zip(found.terms, found.values.unbind(), strict=True))
        nothing = found.values.new_zeros(())
        losses = torch.stack([values.get(term, nothing) for term in self.initial_probe.terms])
        measured = torch.cat([strengths, strengths.new_ones(1)])[self._modules_of_terms] > 0
        self.reward = self.meter.observe(self.reward, losses[None], measured[None])

    def _send_record(
        self,
        choice: _Choice,
        reward: Tensor,
        agreement: Tensor,
        steps: Sequence[LossVector],
        probe: LossVector,
        watch: Stopwatch,
        tapped: Sequence[str],
    ) -> PendingRecord:
        """The numbers of the round that has just been queued, on their way to the host."""
        mean, std = self.policy.posterior(self.bandit)
        tensors = {
            "arm": choice.arm[0],
            "strengths": choice.strengths,
            "weights": self.objective.strengths * self._kinds,
            "agreement": agreement,
            "reward": reward[0],
            "pulls": self.pulls,
            "mean": mean[0],
            "std": std[0],
            "losses": torch.stack([found.values for found in steps]),
            "probe": probe.values,
            "masks": torch.stack([*self._differing.values(), probe.values.new_zeros(())]),
        }
        number, step, learning_rate = self.round, self.step, float(self.training.schedule.get_last_lr()[0])
        layers = {name: pair.student_layers for name, pair in self.objective.pairs.items()}
        share = sum(layers[name] for name in tapped) / max(1, sum(layers.values()))
        terms = steps[0].terms
        parts = [f"{kind}/{name}" for name in self.names for kind in LAYER_KINDS]
        compared = {f"{kind}/{name}" for name, kind in self._parts}

        def describe(values: dict[str, Tensor]) -> RoundRecord:
            refuse_other_masks(dict(zip(self._differing, values["masks"].tolist(), strict=False)))
            for i, row in enumerate(values["losses"], step - len(steps) + 1):
                _refuse_non_finite(number, f"step {i}", terms, row)
            _refuse_non_finite(number, f"the probe after step {step}", probe.terms, values["probe"])
            pulls = {name: int(count) for name, count in _named(self.arm_names, values["pulls"]).items() if count}
            strengths = {name: x for name, x in _named(self.names, values["strengths"]).items() if x}
            modules = tuple(strengths)
            # Where all modules are tapped, those whose gates are closed have losses of 0, which nobody measured.
            distilled = [i for i, term in enumerate(terms) if term.module is None or term.module in modules]
            losses = LossVector(tuple(terms[i] for i in distilled), values["losses"].mean(dim=0)[distilled])
            return RoundRecord(
                round=number,
                step=step,
                arm=int(values["arm"]),
                modules=modules,
                strengths=strengths,
                weights={
                    name: x for name, x in _named(parts, values["weights"].flatten()).items() if x and name in compared
                },
                agreement={
                    name: x for name, x in _named(parts, values["agreement"].flatten()).items() if math.isfinite(x)
                },
                reward=float(values["reward"]),
                pulls=pulls,
                mean={name: x for name, x in _named(self.arm_names, values["mean"]).items() if name in pulls},
                std={name: x for name, x in _named(self.arm_names, values["std"]).items() if name in pulls},
                losses=losses.named(),
                probe=LossVector(probe.terms, values["probe"]).named(),
                learning_rate=learning_rate,
                tapped=share,
                step_seconds=watch.seconds() / len(steps),
            )

        return PendingRecord(tensors, describe)


def _refuse_unshared(config: DistillerConfig, ranks: Ranks) -> None:
    """Raises OptimaError for what several ranks cannot do."""
    for given, name, reason, instead in (
        (
            ranks.count > 1 and config.cuda_graphs,
            "engine.cuda_graphs",
            "a recorded step would not wait for the others",
            "take engine.compile",
        ),
        (
            ranks.sharded and config.optimiser.implementation == "apex",
            "engine.optimiser.implementation apex",
            "its kernels take no shards",
            "take adamw",
        ),
    ):
        if given:
            raise OptimaError(f"{name} does not work on {ranks.count} ranks with {ranks.strategy}: {reason}; {instead}")


def _make_ahead(
    student: nn.Module, teacher_forward: ModelForward[Batch], config: DistillerConfig, ranks: Ranks
) -> TeacherAhead[Batch] | None:
    """None where streams do it better, the teacher is part of a graph, or its ranks speak to each other in an order."""
    on_cpu = next(student.parameters()).device.type == "cpu"
    if config.teacher_ahead and on_cpu and not config.compile and not ranks.sharded:
        return TeacherAhead(teacher_forward, config.precision)
    return None


def _modules_of(terms: Sequence[LossTerm], names: Sequence[str], device: torch.device) -> Tensor:
    """Which module each loss belongs to: int64 [terms]; one more than the last for those of none."""
    return torch.tensor(
        [len(names) if term.module is None else names.index(term.module) for term in terms], device=device
    )


def _named(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """With modules as arms there is one name more than arms, that of all modules."""
    return dict(zip(names, values.tolist(), strict=False))


def _refuse_non_finite(round_number: int, place: str, terms: Sequence[LossTerm], values: Tensor) -> None:
    """Names the terms that were bad first: one step later their gradients have spoilt all the others."""
    bad = [term.name for term, value in zip(terms, values.tolist(), strict=True) if not math.isfinite(value)]
    if bad:
        raise OptimaError(
            f"loss {', '.join(bad)} became NaN or infinite in round {round_number}, at {place}; "
            "lower optimiser.learning_rate or the loss's weight; the last checkpoint is kept"
        )
