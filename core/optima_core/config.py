"""How a student is distilled: every option of the engine, checked when it is made. Imports no torch.

A message about a value names the option as it is reached from the engine's, as "reward.clip".
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from optima_core.bandit.config import BanditConfig

Precision = Literal["fp32", "bf16"]
Divergence = Literal["forward", "reverse", "jsd"]
AttentionKind = Literal["kl", "mse"]
HeadMatching = Literal["match", "mean", "relation"]
Normalisation = Literal["layernorm", "l2"]
RewardKind = Literal["relative", "absolute"]
Balance = Literal["gradient", "none"]
Normaliser = Literal["none", "ratio", "zscore", "quantile"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and kinds of the losses.

    Attributes:
        task: Weight of the student's own task loss.
        logits: Weight of the prediction distillation.
        hidden: Weight of the hidden-state loss of each distilled module (mean over its layers), times its strength: in
            units of the pull of the prediction losses in an engine that balances, else a plain factor.
        attention: Weight of the attention-map loss of each distilled module (mean over its layers), likewise.
        temperature: Softmax temperature T of the prediction distillation, above 0.
        divergence: Direction of the prediction distillation.
        attention_kind: Compare attention maps by KL divergence or by squared error.
        attention_heads: "match" pairs the heads one to one (equal numbers), "mean" compares head-averaged maps,
            "relation" regroups q and k into relation_heads heads.
        relation_heads: Number of heads after regrouping; with attention_heads "relation" only.
        normalize: Normalisation of both sides of the hidden-state loss, or null for none.
    """

    task: float = 1.0
    logits: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0
    temperature: float = 2.0
    divergence: Divergence = "forward"
    attention_kind: AttentionKind = "kl"
    attention_heads: HeadMatching = "match"
    relation_heads: int | None = None
    normalize: Normalisation | None = "layernorm"

    def __post_init__(self) -> None:
        for name in ("task", "logits", "hidden", "attention"):
            weight = getattr(self, name)
            if not 0 <= weight < math.inf:
                raise ValueError(f"objective.{name}, a weight, must be a finite number of at least 0, got {weight}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"objective.temperature must be a finite number above 0, got {self.temperature}")
        for name, known in (
            ("divergence", Divergence),
            ("attention_kind", AttentionKind),
            ("attention_heads", HeadMatching),
        ):
            _check_choice(f"objective.{name}", getattr(self, name), known)
        if self.normalize is not None:
            _check_choice("objective.normalize", self.normalize, Normalisation)
        if (self.relation_heads is not None) != (self.attention_heads == "relation"):
            raise ValueError(
                'objective.relation_heads must be given with objective.attention_heads "relation" and only then, '
                f"got {self.relation_heads}"
            )
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"objective.relation_heads must be at least 1, got {self.relation_heads}")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and its schedule.

    Attributes:
        implementation: "adamw" is torch's fused AdamW, "apex" the FusedAdam of NVIDIA's apex, on CUDA only.
        learning_rate: Peak learning rate, reached at the end of the warm-up.
        schedule: How the learning rate falls after the warm-up: along half a cosine, linearly, or not at all.
        warmup: Share of all steps in which the learning rate rises linearly from zero, 0 to 1.
        final: Learning rate at the last step, as a share of the peak; of no use with a constant schedule.
        weight_decay: Decoupled weight decay, per step and learning rate, of tensors with two or more dimensions.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        clip: Gradients are scaled down to this global L2 norm; 0 leaves them as they are.
    """

    implementation: Literal["adamw", "apex"] = "adamw"
    learning_rate: float = 2e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    final: float = 0.0
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("learning_rate", 0.0, math.inf),
            ("warmup", 0.0, 1.0),
            ("final", 0.0, math.inf),
            ("weight_decay", 0.0, math.inf),
            ("beta1", 0.0, 1.0),
            ("beta2", 0.0, 1.0),
            ("clip", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"optimiser.{name} must be a number from {least:g} to {most:g}, got {value}")


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
        clip: A reward is clipped to plus and minus this, before baseline and normaliser.
        baseline: Subtract the discounted mean of all rewards so far, so that zero is an average round. Not by default:
            where losses fall ever more slowly, that mean lags behind and makes every reward negative, the earlier the
            more, and the arm that was pulled last looks best because it was (bench/COMPARE.md).
        normaliser: "ratio" divides by the discounted mean size of rewards: 1 is an average round, however slowly losses
            fall by now. "zscore" divides the deviation from the discounted mean by the discounted standard deviation.
            "quantile" maps the 20 % and 80 % quantiles of the last `window` rewards to -1 and 1 and clips, as Graves
            et al. (arXiv 1704.03003) do.
        gamma: Discount per round of baseline and normaliser, in (0, 1].
        window: Of "quantile": rounds remembered.
        smoothing: Of source "training": weight of the past in the running losses, per step that measured the loss, in
            [0, 1).
    """

    source: Literal["probe", "training"] = "probe"
    kind: RewardKind = "absolute"
    floor: float = 0.3
    clip: float = 1.0
    baseline: bool = False
    normaliser: Normaliser = "ratio"
    gamma: float = 0.8
    window: int = 200
    smoothing: float = 0.9

    def __post_init__(self) -> None:
        _check_choice("reward.source", self.source, Literal["probe", "training"])
        _check_choice("reward.kind", self.kind, RewardKind)
        _check_choice("reward.normaliser", self.normaliser, Normaliser)
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"reward.floor must be a finite number of at least 0, got {self.floor}")
        if not self.clip > 0:
            raise ValueError(f"reward.clip must be positive, got {self.clip}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"reward.gamma must be in (0, 1], got {self.gamma}")
        if self.window < 1:
            raise ValueError(f"reward.window must be at least 1 round, got {self.window}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"reward.smoothing must be in [0, 1), got {self.smoothing}")


@dataclass(frozen=True)
class DistillerConfig:
    """How the student is distilled.

    Attributes:
        rounds: Number of rounds; in each, one arm is distilled, or all modules.
        steps_per_round: Optimiser steps a round.
        accumulate: Batches a step, whose gradients are averaged: the memory of one batch, the step of a larger one.
            Each batch weighs the same, also where their masks leave different numbers of tokens.
        objective: Weights and kinds of the losses.
        optimiser: AdamW and its schedule over all steps.
        bandit: Who chooses the modules; by default all of them are distilled in every round, the best that was found
            for runs of tens of rounds (bench/COMPARE.md).
        reward: What a round earns.
        precision: Arithmetic of both models' forward passes; weights and optimiser stay fp32. "fp16" scales the losses,
            and skips a step whose gradients overflow.
        compile: Compile teacher, student and losses into one graph that serves every arm through its gates. All modules
            are tapped then. The first step takes a minute or so; a CPU needs a C++ compiler. On several ranks each
            layer is a graph of its own, since gradients and shards travel while other layers are computed; what is
            tapped is then up to `read_arm`.
        read_arm: The host reads once a round which arm was chosen, asynchronously, when it launches the round; the
            modules of other arms are not tapped and cost nothing. False keeps the choice on the device: no read, and
            the next rounds may be queued at any time, but in every round all modules are tapped, their losses' kernels
            leave at closed gates, and each update keeps copies of projections and their moments. With compile on one
            rank it is so in any case.
        cuda_graphs: On a CUDA device, record the step of each arm as a CUDA graph and replay it, where the host takes
            longer to launch a step than the device to run it. Batches must have the same shapes in every step. The
            memory of a recorded step stays taken while the probe is measured. On a CPU of no effect.
        teacher_ahead: On a CPU with two threads or more, load the next batch and run the teacher on it in a thread of
            its own, while the student learns this one; each side has half of the threads. Takes the memory of one more
            batch and of the teacher's forward pass. False does one after the other: for a `load` or a teacher that
            depends on what training changes, or a teacher that takes far less than half of a step. Of no effect on a
            GPU, with compile, and with parameters that are sharded.
        ema: Decay, per step, of a running average of the student's weights, which is then the result; 0 keeps none.
            0.999 averages over about the last thousand steps.
        balance: "gradient" measures the objective's weights hidden and attention by how hard the prediction losses
            pull at the student: 1 is a gradient of the same norm, looked at in the first step of every round; "none"
            takes them as factors of the losses.
        strength_first: What a balanced weight of 1 counts in the first round, above 0. Without a balance of no effect.
        strength_last: The same in the last round, with equal ratios between rounds: where it is the smaller, the layers
            lead at first and the predictions at the end.
    """

    rounds: int = 60
    steps_per_round: int = 25
    accumulate: int = 1
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    bandit: BanditConfig = field(default_factory=lambda: BanditConfig("all_modules"))
    reward: RewardConfig = field(default_factory=RewardConfig)
    precision: Precision | Literal["fp16"] = "fp32"
    compile: bool = False
    read_arm: bool = True
    cuda_graphs: bool = False
    teacher_ahead: bool = True
    ema: float = 0.0
    balance: Balance = "gradient"
    strength_first: float = 1.0
    strength_last: float = 1.0

    def __post_init__(self) -> None:
        _check_choice("balance", self.balance, Balance)
        for name in ("rounds", "steps_per_round", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for given, other in (
            (self.compile, "compile"),
            (not self.read_arm, "read_arm: false"),
            (self.optimiser.implementation == "apex", "optimiser.implementation apex"),
        ):
            if self.cuda_graphs and given:
                raise ValueError(f"cuda_graphs and {other} exclude each other; take one of them")
        for name in ("strength_first", "strength_last"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be a number of at least 0 and below 1, got {self.ema}")


def _check_choice(name: str, given: str, known: object) -> None:
    choices = get_args(known)
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {given!r}")
