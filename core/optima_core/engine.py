"""The engine: rounds of optimiser steps on the module that the bandit chose, and the reward that follows.

One round: the policy picks an arm; for some steps the student learns with the layer losses of that arm's modules
switched on; then the losses of a probe batch, held from the start, say how far everything fell; that is the arm's
reward.
Everything that decides anything is a tensor on the device; the host reads once a round, for the record.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from optima_core.bandit import Policy, arm_gates, arm_names, count_arms, make_policy
from optima_core.bandit.registry import describe_hyper_parameters
from optima_core.errors import OptimaError
from optima_core.modules import ModulePair
from optima_core.objective import Forward, Objective, ObjectiveConfig
from optima_core.optimiser import OptimiserConfig, clip_gradients, make_optimiser
from optima_core.precision import Precision, arithmetic
from optima_core.reward import RewardMeter
from optima_core.taps import WantedTaps

Batch = TypeVar("Batch")
ModelForward = Callable[[Batch, WantedTaps], Forward]
"""(batch, wanted taps) -> what the model shows the objective."""


@dataclass(frozen=True)
class BanditConfig:
    """Who chooses the module.

    Attributes:
        policy: Name of the policy, as `optima_core.bandit.make_policy` knows it.
        arms: "modules" offers each module alone, "subsets" every non-empty set of modules.
        min_share: Least share of the rounds of every arm, at most 1 / arms; policies that do not learn ignore it.
        options: Other hyper-parameters of the policy by name, e.g. gamma, nu; those left out keep their defaults.
    """

    policy: str = "discounted_thompson"
    arms: Literal["modules", "subsets"] = "modules"
    min_share: float = 0.1
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardConfig:
    """What a round earns.

    Attributes:
        source: "probe" measures the losses of a held batch after each round, "training" smooths those of the steps.
        kind: Decrement relative to where a loss stood, or absolute.
        floor: Share of a loss's first value added to where it stood, so that a loss near zero does not rule; at least
            0.
        clip: A reward is clipped to plus and minus this.
        baseline: Subtract the discounted mean of all rewards so far, so that zero is an average round.
        normaliser: Rescale rewards by their running z-score or quantiles.
        gamma: Discount per round of the running mean and standard deviation, in (0, 1]. Every loss falls fast at
            first; a short memory keeps that from being credited to the modules tried first.
    """

    source: Literal["probe", "training"] = "probe"
    kind: Literal["relative", "absolute"] = "relative"
    floor: float = 0.3
    clip: float = 1.0
    baseline: bool = True
    normaliser: Literal["none", "zscore", "quantile"] = "none"
    gamma: float = 0.8


@dataclass(frozen=True)
class DistillerConfig:
    """How the student is distilled.

    Attributes:
        rounds: Number of rounds; in each, one arm is distilled.
        steps_per_round: Optimiser steps a round.
        objective: Weights and kinds of the losses.
        optimiser: AdamW and its schedule over all steps.
        bandit: Who chooses the module.
        reward: What a round earns.
        precision: Arithmetic of both models' forward passes.
    """

    rounds: int = 60
    steps_per_round: int = 25
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    bandit: BanditConfig = field(default_factory=BanditConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        for name in ("rounds", "steps_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round, on the host.

    round: from 1. step: optimiser steps taken in all. arm: index, -1 for all modules. modules: those distilled.
    reward: what the round earned. pulls: rounds by arm name so far, for the arms tried; mean, std: their posterior.
    losses: mean of each loss term over the round's steps. probe: each loss term on the probe batch after the round.
    """

    round: int
    step: int
    arm: int
    modules: tuple[str, ...]
    reward: float
    pulls: dict[str, int]
    mean: dict[str, float]
    std: dict[str, float]
    losses: dict[str, float]
    probe: dict[str, float]
    learning_rate: float


class Distiller(Generic[Batch]):
    """Distils a teacher into a student, module by module.

    Args:
        student: The module whose parameters are trained.
        student_forward: Runs the student on a batch and returns its losses' ingredients.
        teacher_forward: The same of the teacher; runs under no_grad. Put the teacher into eval mode beforehand.
        modules: The modules that can be distilled: the arms.
        load: Optimiser step -> training batch. A pure function of the step makes a resumed run equal an uninterrupted
            one.
        probe: The held batch that rewards are measured on.
        config: See `DistillerConfig`.
        seed: Seed of the bandit's random numbers.

    Raises ValueError if the configuration names a policy or option that does not exist.
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
    ) -> None:
        self.config = config
        self.student = student
        self.student_forward = student_forward
        self.teacher_forward = teacher_forward
        self.load = load
        self.probe = probe
        self.device = next(student.parameters()).device
        self.names = tuple(pair.name for pair in modules)
        self.objective = Objective(modules, config.objective).to(self.device)
        self.trained = [*student.parameters(), *self.objective.parameters()]
        self.optimiser, self.schedule = make_optimiser(
            self.trained, config.optimiser, config.rounds * config.steps_per_round
        )
        arms = config.bandit.arms
        self.policy = _make_policy(config.bandit, count_arms(len(modules), arms))
        self.gates = arm_gates(len(modules), arms, self.device)
        self.arm_names = arm_names(self.names, arms)
        reward = config.reward
        self.meter = RewardMeter(
            kind=reward.kind,
            floor=reward.floor,
            clip=reward.clip,
            baseline=reward.baseline,
            normaliser=reward.normaliser,
            gamma=reward.gamma,
        )
        self.bandit = self.policy.init(batch=1, seed=seed, device=self.device)
        self.pulls: dict[str, int] = {}
        self.round = 0
        self.step = 0
        self._probed_teacher = self._forward_teacher(probe, self.names)
        self.initial_probe = self._probe_terms()
        self.reward = self.meter.init(self.objective.tracked(self.initial_probe)[None])

    def run_round(self) -> RoundRecord:
        """One round.

        Raises OptimaError, naming the loss term, if a loss became NaN or infinite; the state is then not worth saving.
        """
        arm, self.bandit = self.policy.select(self.bandit)
        gates = self.gates[arm][0]
        steps: list[dict[str, Tensor]] = []
        for _ in range(self.config.steps_per_round):
            steps.append(self._train_step(self.load(self.step), gates))
            self.step += 1
        probe = self._probe_terms()
        losses = {name: torch.stack([terms[name] for terms in steps]) for name in steps[0]}
        self._refuse_non_finite(losses, probe)
        if self.config.reward.source == "probe":
            reward, self.reward = self.meter.measure(self.reward, self.objective.tracked(probe)[None])
        else:
            reward, self.reward = self.meter.finish(self.reward)
        self.bandit = self.policy.update(self.bandit, arm, reward)
        self.round += 1
        return self._record(int(arm), gates, float(reward), losses, probe)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, torch's random numbers included.

        Holds references to live tensors: write it out, or copy it, before the next round.
        """
        return {
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "bandit": self.bandit,
            "reward": self.reward,
            "random": {"cpu": torch.get_rng_state()}
            | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}),
            "pulls": self.pulls,
            "round": self.round,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, for a distiller of the same configuration."""
        self.student.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.bandit = {name: tensor.to(self.device) for name, tensor in state["bandit"].items()}
        self.reward = {name: tensor.to(self.device) for name, tensor in state["reward"].items()}
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        self.pulls = dict(state["pulls"])
        self.round = state["round"]
        self.step = state["step"]

    def _train_step(self, batch: Batch, gates: Tensor) -> dict[str, Tensor]:
        chosen = self._distilled(gates)
        wanted, _ = self.objective.wanted(chosen)
        teacher = self._forward_teacher(batch, chosen)
        gate_of = {name: gates[self.names.index(name)] for name in chosen}
        with arithmetic(self.config.precision, self.device):
            terms = self.objective(self.student_forward(batch, wanted), teacher, gate_of)
        self.objective.total(terms).backward()  # type: ignore[no-untyped-call]
        clip_gradients(self.trained, self.config.optimiser.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.config.reward.source == "training":
            self._observe(terms, gates)
        return {name: term.detach() for name, term in terms.items()}

    def _distilled(self, gates: Tensor) -> tuple[str, ...]:
        """The modules to tap: on a CPU those of the arm; elsewhere all, since reading the arm would stall."""
        if self.device.type != "cpu":
            return self.names
        return tuple(name for name, gate in zip(self.names, gates.tolist(), strict=True) if gate)

    def _forward_teacher(self, batch: Batch, modules: Sequence[str]) -> Forward:
        _, wanted = self.objective.wanted(modules)
        with torch.no_grad(), arithmetic(self.config.precision, self.device):
            return self.teacher_forward(batch, wanted)

    def _probe_terms(self) -> dict[str, Tensor]:
        wanted, _ = self.objective.wanted(self.names)
        open_gates = dict.fromkeys(self.names, torch.ones((), device=self.device))
        # A probe is measured without dropout, and teaches no running statistics.
        training = [module for module in self.student.modules() if module.training]
        self.student.eval()
        with torch.no_grad(), arithmetic(self.config.precision, self.device):
            terms: dict[str, Tensor] = self.objective(
                self.student_forward(self.probe, wanted), self._probed_teacher, open_gates
            )
        for module in training:
            module.training = True
        return terms

    def _observe(self, terms: dict[str, Tensor], gates: Tensor) -> None:
        """Hands a step's losses to the reward; those of modules that were not distilled count as not measured."""
        losses, measured = [], []
        groups = self.objective.groups(terms)
        for name in self.objective.groups(self.initial_probe):
            module = name.partition("/")[2]
            found = groups.get(name)
            losses.append(torch.zeros((), device=self.device) if found is None else found.detach().float())
            gate = gates[self.names.index(module)] if module else torch.ones_like(gates[0])
            measured.append((gate > 0) & (found is not None))
        self.reward = self.meter.observe(self.reward, torch.stack(losses)[None], torch.stack(measured)[None])

    def _refuse_non_finite(self, losses: dict[str, Tensor], probe: dict[str, Tensor]) -> None:
        """Names the terms that were bad first: one step later their gradients have spoilt all the others."""
        steps = torch.isfinite(torch.stack([steps.float() for steps in losses.values()], dim=1)).tolist()
        checks = [(f"step {self.step - len(steps) + i}", losses, finite) for i, finite in enumerate(steps, 1)]
        finite = torch.isfinite(torch.stack([term.float() for term in probe.values()])).tolist()
        checks.append((f"the probe after step {self.step}", probe, finite))
        for place, names, row in checks:
            bad = [name for name, good in zip(names, row, strict=True) if not good]
            if bad:
                raise OptimaError(
                    f"loss {', '.join(bad)} became NaN or infinite in round {self.round + 1}, at {place}; "
                    "lower optimiser.learning_rate or the loss's weight; the last checkpoint is kept"
                )

    def _record(
        self, arm: int, gates: Tensor, reward: float, losses: dict[str, Tensor], probe: dict[str, Tensor]
    ) -> RoundRecord:
        name = self.arm_names[arm]
        self.pulls[name] = self.pulls.get(name, 0) + 1
        mean, std = (
            {name: value for name, value in zip(self.arm_names, row[0].tolist(), strict=False) if name in self.pulls}
            for row in self.policy.posterior(self.bandit)
        )
        return RoundRecord(
            round=self.round,
            step=self.step,
            arm=arm,
            modules=tuple(name for name, gate in zip(self.names, gates.tolist(), strict=True) if gate),
            reward=reward,
            pulls=dict(self.pulls),
            mean=mean,
            std=std,
            losses={name: float(steps.mean()) for name, steps in losses.items()},
            probe={name: float(term) for name, term in probe.items()},
            learning_rate=float(self.schedule.get_last_lr()[0]),
        )


def _make_policy(config: BanditConfig, arms: int) -> Policy:
    options = dict(config.options)
    policy = make_policy(config.policy, arms=arms, **options)
    if "min_share" in options or "min_share" not in describe_hyper_parameters(config.policy):
        return policy
    return make_policy(config.policy, arms=arms, min_share=min(config.min_share, 1 / arms), **options)
