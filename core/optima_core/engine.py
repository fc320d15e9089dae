"""The engine: rounds of optimiser steps on the module that the bandit chose, and the reward that follows.

One round: the policy picks an arm; for some steps the student learns with the layer losses of that arm's modules
switched on; then the losses of a probe batch, held from the start, say how far everything fell; that is the arm's
reward.
Everything that decides anything is a tensor on the device; the host reads once a round, for the record, and need not
wait for that before it queues the next round.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from optima_core.bandit import Policy, arm_gates, arm_names, count_arms, make_policy
from optima_core.bandit.registry import describe_hyper_parameters, discounts_rewards
from optima_core.errors import OptimaError
from optima_core.learner import Learner
from optima_core.modules import ModulePair
from optima_core.objective import Forward, Objective, ObjectiveConfig
from optima_core.optimiser import OptimiserConfig, clip_gradients, make_optimiser, still_behind_gates
from optima_core.parallel import Ranks
from optima_core.precision import Precision, arithmetic, make_scaler
from optima_core.records import PendingRecord, RoundRecord, Stopwatch
from optima_core.reward import RewardMeter
from optima_core.state import TRAINED, load_random, load_trained, random_state, trained_state, whole_student
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
        gamma: Discount per round of past rewards, for the policies that discount them: a memory of about 1 / (1 -
            gamma) rounds. Shorter than the policies' own default, which suits thousands of rounds: in a run of tens,
            rewards fall tenfold, and old ones say little about what an arm brings now.
        options: Other hyper-parameters of the policy by name, e.g. nu; those left out keep their defaults.
    """

    policy: str = "discounted_thompson"
    arms: Literal["modules", "subsets"] = "modules"
    min_share: float = 0.1
    gamma: float = 0.8
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardConfig:
    """What a round earns.

    Attributes:
        source: "probe" measures the losses of a held batch after each round, "training" smooths those of the steps.
        kind: "absolute" is how far the losses, each layer's among them, fell together, as a share of their first sum;
            "relative" the mean over losses of how far each fell from where it stood, for losses whose sizes differ by
            decades.
        floor: Of "relative": share of a loss's first value added to where it stood, so that a loss near zero does not
            rule; at least 0.
        clip: A reward is clipped to plus and minus this.
        baseline: Subtract the discounted mean of all rewards so far, so that zero is an average round. Not by default:
            where losses fall ever more slowly, that mean lags behind and makes every reward negative, the earlier the
            more, and the arm that was pulled last looks best because it was (bench/COMPARE.md).
        normaliser: Rescale rewards by their running mean size ("ratio": 1 is an average round, however slowly losses
            fall by now), z-score or quantiles.
        gamma: Discount per round of baseline and normaliser, in (0, 1].
    """

    source: Literal["probe", "training"] = "probe"
    kind: Literal["relative", "absolute"] = "absolute"
    floor: float = 0.3
    clip: float = 1.0
    baseline: bool = False
    normaliser: Literal["none", "ratio", "zscore", "quantile"] = "ratio"
    gamma: float = 0.8


@dataclass(frozen=True)
class DistillerConfig:
    """How the student is distilled.

    Attributes:
        rounds: Number of rounds; in each, one arm is distilled.
        steps_per_round: Optimiser steps a round.
        accumulate: Batches a step, whose gradients are averaged: the memory of one batch, the step of a larger one.
            Each batch weighs the same, also where their masks leave different numbers of tokens.
        objective: Weights and kinds of the losses.
        optimiser: AdamW and its schedule over all steps.
        bandit: Who chooses the module.
        reward: What a round earns.
        precision: Arithmetic of both models' forward passes; weights and optimiser stay fp32. "fp16" scales the losses,
            and skips a step whose gradients overflow.
        compile: Compile teacher, student and losses into one graph that serves every arm through its gates. All modules
            are tapped then. The first step takes a minute or so; a CPU needs a C++ compiler.
        ema: Decay, per step, of a running average of the student's weights, which is then the result; 0 keeps none.
            0.999 averages over about the last thousand steps.
    """

    rounds: int = 60
    steps_per_round: int = 25
    accumulate: int = 1
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    bandit: BanditConfig = field(default_factory=BanditConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    precision: Precision | Literal["fp16"] = "fp32"
    compile: bool = False
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rounds", "steps_per_round", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be a number of at least 0 and below 1, got {self.ema}")


class Distiller(Generic[Batch]):
    """Distils a teacher into a student, module by module.

    Args:
        student: The module whose parameters are trained.
        student_forward: Runs the student on a batch and returns its losses' ingredients.
        teacher_forward: The same of the teacher; runs under no_grad. Put the teacher into eval mode beforehand.
        modules: The modules that can be distilled: the arms.
        load: Number of a batch, from 0 -> training batch; step s takes the batches from s * accumulate on. A pure
            function of the number makes a resumed run equal an uninterrupted one.
        probe: The held batch that rewards are measured on.
        config: See `DistillerConfig`.
        seed: Seed of the bandit's random numbers.
        ranks: The processes of the run (`optima_core.parallel.join_ranks`). Each gives `load` and `probe` that return
            its slice (`Ranks.share`) of the batch. With FSDP the student is sharded here, a teacher beforehand by
            `Ranks.shard`.

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
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.student = student
        self.student_forward = student_forward
        self.teacher_forward = teacher_forward
        self.load = load
        self.probe = probe
        self.device = next(student.parameters()).device
        self.names = tuple(pair.name for pair in modules)
        self._arm_is_known = self.device.type == "cpu" and not config.compile
        self._refuse_unshared()
        weigh = self.ranks.weigh if self.ranks.count > 1 else None
        self.objective = Objective(modules, config.objective, weigh).to(self.device)
        self.learner = Learner(student, student_forward, self.objective)
        self.learn = self.ranks.wrap(self.learner)
        self.trained = [*student.parameters(), *self.objective.parameters()]
        self.optimiser, self.schedule = make_optimiser(
            self.trained, config.optimiser, config.rounds * config.steps_per_round
        )
        self.scaler = make_scaler(config.precision, self.device)
        self.ema = _averaged(student, config.ema) if config.ema else None
        self._terms = torch.compile(self._compute_terms, fullgraph=True) if config.compile else self._compute_terms
        self._errors = _told_in_a_line if config.compile else contextlib.nullcontext
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
        self.pulls = torch.zeros(len(self.arm_names), dtype=torch.int64, device=self.device)
        self.round = 0
        self.step = 0
        self._probed_teacher = self._forward_teacher(probe, self.names)
        self.initial_probe = self._probe_terms()
        self.reward = self.meter.init(_stacked(self.initial_probe))
        if not self.ranks.first:
            # Dropout differs between slices of a batch; the first rank draws what a single process does.
            torch.manual_seed(torch.initial_seed() + self.ranks.rank)

    def _refuse_unshared(self) -> None:
        """Raises OptimaError for what several ranks cannot do."""
        config, sharded = self.config, self.ranks.sharded
        for given, name, instead in (
            (self.ranks.count > 1 and config.compile, "engine.compile", "leave it out"),
            (sharded and config.ema > 0, "engine.ema", "take --parallel ddp"),
            (sharded and config.precision == "fp16", "engine.precision fp16", "take bf16"),
            (
                sharded and config.optimiser.implementation == "apex",
                "engine.optimiser.implementation apex",
                "take adamw",
            ),
        ):
            if given:
                raise OptimaError(
                    f"{name} does not work on {self.ranks.count} ranks with {self.ranks.strategy}; {instead}"
                )

    @property
    def result(self) -> nn.Module:
        """The student to score and to keep: its running average if `ema` asks for one, otherwise itself."""
        return self.student if self.ema is None else self.ema.module

    def gather_result(self, copy: nn.Module) -> nn.Module:
        """`result`, of sharded parameters, written into an unsharded copy of the student.

        All ranks must call this; only the first one's copy is filled.
        """
        weights = whole_student(self.learner)
        if self.ranks.first:
            copy.load_state_dict(weights)
        return copy

    def run_round(self) -> RoundRecord:
        """One round, and what happened in it.

        Raises OptimaError, naming the loss term, if a loss became NaN or infinite; the state is then not worth saving.
        """
        return self.launch_round().result()

    def launch_round(self) -> PendingRecord:
        """One round, of which the host reads nothing: on a GPU it is queued, and the next one may be queued behind it.

        A loss that is not finite is noticed by the record's `result`, so ask for that before you save the state.
        """
        arm, self.bandit = self.policy.select(self.bandit)
        gates = self.gates[arm][0]
        chosen = self._distilled(gates)
        watch = Stopwatch(self.device)
        steps: list[dict[str, Tensor]] = []
        for _ in range(self.config.steps_per_round):
            steps.append(self._train_step(gates, chosen))
            self.step += 1
        watch.stop()
        probe = self._probe_terms()
        if self.config.reward.source == "probe":
            reward, self.reward = self.meter.measure(self.reward, _stacked(probe))
        else:
            reward, self.reward = self.meter.finish(self.reward)
        self.bandit = self.policy.update(self.bandit, arm, reward)
        self.pulls = self.pulls.index_add(0, arm % len(self.arm_names), torch.ones_like(arm))
        self.round += 1
        return self._send_record(arm, gates, reward, steps, probe, watch, chosen)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, torch's random numbers included.

        Holds references to live tensors: write it out, or copy it, before the next round. With several ranks all must
        call this; the first one's result is whole, however the parameters are sharded.
        """
        return {
            **trained_state(self.learner, self.optimiser),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": {} if self.ema is None else self.ema.state_dict(),
            "bandit": self.bandit,
            "reward": self.reward,
            "random": random_state(self.ranks),
            "pulls": self.pulls,
            "round": self.round,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, for a distiller of the same configuration on any number of ranks.

        All ranks must call this; what the others hand in is not looked at, the first one's state is sent to them.
        """
        load_trained(self.learner, self.optimiser, state, self.ranks)
        state = self.ranks.broadcast({name: part for name, part in state.items() if name not in TRAINED})
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.bandit = {name: tensor.to(self.device) for name, tensor in state["bandit"].items()}
        self.reward = {name: tensor.to(self.device) for name, tensor in state["reward"].items()}
        load_random(state["random"], self.ranks)
        self.pulls = state["pulls"].to(self.device)
        self.round = state["round"]
        self.step = state["step"]

    def _train_step(self, gates: Tensor, chosen: Sequence[str]) -> dict[str, Tensor]:
        gate_of = {name: gates[self.names.index(name)] for name in chosen}
        batches: list[dict[str, Tensor]] = []
        for i in range(self.config.accumulate):
            batch = self.load(self.step * self.config.accumulate + i)
            with self.ranks.gradients_kept(self.learn, until_last=i + 1 < self.config.accumulate):
                with arithmetic(self.config.precision, self.device), self._errors():
                    terms = self._terms(batch, gate_of)
                total = self.objective.total(terms) / self.config.accumulate
                self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            batches.append({name: term.detach() for name, term in terms.items()})
        self.scaler.unscale_(self.optimiser)
        clip_gradients(self.trained, self.config.optimiser.clip)
        # The modules of an arm that the host knows are all distilled.
        gated = [(gate, tuple(self.objective.projections[name].parameters())) for name, gate in gate_of.items()]
        with still_behind_gates(self.optimiser, [] if self._arm_is_known else gated):
            self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.student)
        own = {name: torch.stack([terms[name] for terms in batches]).mean(dim=0) for name in batches[0]}
        terms = self.ranks.mean(own)
        if self.config.reward.source == "training":
            self._observe(terms, gates)
        return terms

    def _compute_terms(self, batch: Batch, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss terms of a batch, for the modules that have a gate: what `compile` makes one graph of."""
        wanted, wanted_of_teacher = self.objective.wanted(tuple(gates))
        with torch.no_grad():
            teacher = self.teacher_forward(batch, wanted_of_teacher)
        terms: dict[str, Tensor] = self.learn(batch, wanted, teacher, gates)
        return terms

    def _distilled(self, gates: Tensor) -> tuple[str, ...]:
        """The modules to tap: on a CPU those of the arm; elsewhere all, since reading the arm would stall.

        One graph for all arms taps all modules, too.
        """
        if not self._arm_is_known:
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
            terms = self.ranks.mean(self.learn(self.probe, wanted, self._probed_teacher, open_gates))
        for module in training:
            module.training = True
        return terms

    def _observe(self, terms: dict[str, Tensor], gates: Tensor) -> None:
        """Hands a step's losses to the reward; those of modules that were not distilled count as not measured."""
        losses, measured = [], []
        for name in self.initial_probe:
            found = terms.get(name)
            losses.append(torch.zeros((), device=self.device) if found is None else found.detach().float())
            gate = gates[self.names.index(name.split("/")[1])] if "/" in name else torch.ones_like(gates[0])
            measured.append((gate > 0) & (found is not None))
        self.reward = self.meter.observe(self.reward, torch.stack(losses)[None], torch.stack(measured)[None])

    def _send_record(
        self,
        arm: Tensor,
        gates: Tensor,
        reward: Tensor,
        steps: Sequence[dict[str, Tensor]],
        probe: dict[str, Tensor],
        watch: Stopwatch,
        tapped: Sequence[str],
    ) -> PendingRecord:
        """The numbers of the round that has just been queued, on their way to the host."""
        mean, std = self.policy.posterior(self.bandit)
        tensors = {
            "arm": arm[0],
            "gates": gates,
            "reward": reward[0],
            "pulls": self.pulls,
            "mean": mean[0],
            "std": std[0],
            "losses": torch.stack([torch.stack([term.float() for term in terms.values()]) for terms in steps]),
            "probe": torch.stack([term.float() for term in probe.values()]),
        }
        number, step, learning_rate = self.round, self.step, float(self.schedule.get_last_lr()[0])
        layers = {name: pair.student_layers for name, pair in self.objective.pairs.items()}
        share = sum(layers[name] for name in tapped) / max(1, sum(layers.values()))
        terms, probe_terms = tuple(steps[0]), tuple(probe)

        def describe(values: dict[str, Tensor]) -> RoundRecord:
            for i, row in enumerate(values["losses"], step - len(steps) + 1):
                _refuse_non_finite(number, f"step {i}", terms, row)
            _refuse_non_finite(number, f"the probe after step {step}", probe_terms, values["probe"])
            pulls = {name: int(count) for name, count in _named(self.arm_names, values["pulls"]).items() if count}
            modules = tuple(name for name, gate in _named(self.names, values["gates"]).items() if gate)
            losses = _named(terms, values["losses"].mean(dim=0))
            return RoundRecord(
                round=number,
                step=step,
                arm=int(values["arm"]),
                modules=modules,
                reward=float(values["reward"]),
                pulls=pulls,
                mean={name: x for name, x in _named(self.arm_names, values["mean"]).items() if name in pulls},
                std={name: x for name, x in _named(self.arm_names, values["std"]).items() if name in pulls},
                # Where all modules are tapped, those whose gates are closed have losses of 0, which nobody measured.
                losses={name: x for name, x in losses.items() if "/" not in name or name.split("/")[1] in modules},
                probe=_named(probe_terms, values["probe"]),
                learning_rate=learning_rate,
                tapped=share,
                step_seconds=watch.seconds() / len(steps),
            )

        return PendingRecord(tensors, describe)


@contextlib.contextmanager
def _told_in_a_line() -> Iterator[None]:
    """What cannot be compiled ends in a page of advice, of which one line says what it was."""
    try:
        yield
    except torch._dynamo.exc.Unsupported as error:
        lines = [line.strip() for line in str(error).splitlines()]
        context = [line.partition(":")[2].strip() for line in lines if line.startswith("Developer debug context")]
        raise OptimaError(
            f"compile: teacher, student and losses do not make one graph ({lines[0]}: {' '.join(context)}); "
            "take compile: false"
        ) from error


def _stacked(terms: Mapping[str, Tensor]) -> Tensor:
    """The losses that a reward is made of, those of every layer among them: float32 [1, losses]."""
    return torch.stack(list(terms.values())).float()[None]


def _averaged(student: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def _named(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """With modules as arms there is one name more than arms, that of all modules."""
    return dict(zip(names, values.tolist(), strict=False))


def _refuse_non_finite(round_number: int, place: str, names: Sequence[str], values: Tensor) -> None:
    """Names the terms that were bad first: one step later their gradients have spoilt all the others."""
    bad = [name for name, value in _named(names, values).items() if not math.isfinite(value)]
    if bad:
        raise OptimaError(
            f"loss {', '.join(bad)} became NaN or infinite in round {round_number}, at {place}; "
            "lower optimiser.learning_rate or the loss's weight; the last checkpoint is kept"
        )


def _make_policy(config: BanditConfig, arms: int) -> Policy:
    """The policy with those of the engine's settings that it knows and `options` does not give."""
    make_policy(config.policy, arms=arms, **config.options)  # what is wrong with the options alone is said first
    settings: dict[str, float] = {}
    if "min_share" in describe_hyper_parameters(config.policy):
        settings["min_share"] = min(config.min_share, 1 / arms)
    if discounts_rewards(config.policy):
        settings["gamma"] = config.gamma
    return make_policy(config.policy, arms=arms, **settings | config.options)
