"""The objective: task loss, prediction distillation, and the layer losses of the modules chosen this round.

L = w_task * task + w_logits * logits + sum over layers of the chosen modules of (w_hidden * hidden + w_attention *
attention)

The layer sums are means over a module's layers, so that the weights mean the same for a shallow and a deep module. Each
module's terms carry a gate on the device: 1 where the module is distilled this round, else 0.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from optima_core.modules import ModulePair
from optima_core.taps import AttentionTap, LayerTap, Taps, WantedTaps
from optima_kernels import attention_map_loss, hidden_mse, linear_kl, prediction_kl
from optima_kernels.reference import attended_elements


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and kinds of the losses.

    Attributes:
        task: Weight of the student's own task loss.
        logits: Weight of the prediction distillation.
        hidden: Weight of the hidden-state loss of each distilled module (mean over its layers). With one of three
            modules distilled at a time, 3 teaches as much over a run as 1 with all of them.
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
    hidden: float = 3.0
    attention: float = 3.0
    temperature: float = 2.0
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    attention_kind: Literal["kl", "mse"] = "kl"
    attention_heads: Literal["match", "mean", "relation"] = "match"
    relation_heads: int | None = None
    normalize: Literal["layernorm", "l2"] | None = "layernorm"

    def __post_init__(self) -> None:
        for name in ("task", "logits", "hidden", "attention"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}, a weight, must be a finite number of at least 0, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {self.temperature}")


class LogitPrediction(NamedTuple):
    """Predictions as logits, for small answer sets.

    logits: [rows, V]; weight: float [rows], 0 for a row that does not count, or None.
    """

    logits: Tensor
    weight: Tensor | None = None


class LinearPrediction(NamedTuple):
    """Predictions as states and head, for vocabularies: the logits are never stored.

    hidden: [tokens, D]; weight: [V, D]; bias: [V] or None; mask: bool [tokens], True counts, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None


class Forward(NamedTuple):
    """What a model shows the objective.

    task_loss: scalar; the teacher's is not used.
    prediction: None where predictions are not to be distilled.
    taps: module name -> taps of the wanted layers.
    task_count: the number of tokens or items that task_loss is a mean over, 0-d if a tensor; None where it is the same
        on all ranks.
    """

    task_loss: Tensor
    prediction: LogitPrediction | LinearPrediction | None
    taps: Taps
    task_count: Tensor | int | None = None


class _Mean(NamedTuple):
    """A loss that is a mean, and over how many elements (up to a factor that is the same on all ranks)."""

    value: Tensor
    elements: Callable[[], Tensor | int]


class Objective(nn.Module):
    """Holds the learned projections from student to teacher width, one a layer, and computes the loss terms.

    weigh: counts [means] -> factors [means] that the means are multiplied by, for batches that are slices of a larger
        one (`optima_core.parallel.Ranks.weigh`); None leaves them as they are.
    """

    def __init__(
        self,
        modules: Sequence[ModulePair],
        config: ObjectiveConfig,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.weigh = weigh
        self.pairs = {pair.name: pair for pair in modules}
        if len(self.pairs) != len(modules):
            raise ValueError(f"modules must have different names, got {[pair.name for pair in modules]}")
        self.projections = nn.ModuleDict(
            {
                pair.name: nn.ModuleList(
                    nn.Linear(pair.student_width, pair.teacher_width) for _ in range(pair.student_layers)
                )
                for pair in modules
            }
        )

    def wanted(self, modules: Sequence[str]) -> tuple[WantedTaps, WantedTaps]:
        """The taps that distilling these modules needs: of the student, and of the teacher."""
        student = {name: tuple(range(self.pairs[name].student_layers)) for name in modules}
        teacher = {name: tuple(sorted(set(self.pairs[name].teacher_layer_of()))) for name in modules}
        return student, teacher

    def forward(self, student: Forward, teacher: Forward, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The unweighted loss terms, scalars by name; but for the task's, a term of weight 0 is left out.

        Names: "task", "logits", "hidden/<module>/<layer>", "attention/<module>/<layer>" with the student's layer.
        gates: module name -> 0-d tensor; the modules named here must have been tapped.
        """
        config = self.config
        task_count = student.task_count
        means = {"task": [_Mean(student.task_loss, lambda: 1 if task_count is None else task_count)]}
        if config.logits and student.prediction is not None and teacher.prediction is not None:
            means["logits"] = [self._prediction(student.prediction, teacher.prediction)]
        for name, gate in gates.items():
            layers = self.pairs[name].teacher_layer_of()
            tapped = dict(zip(sorted(set(layers)), teacher.taps[name], strict=True))
            for i, tap in enumerate(student.taps[name]):
                target = tapped[layers[i]]
                if config.hidden:
                    means[f"hidden/{name}/{i}"] = [self._hidden(name, i, tap, target, gate)]
                if config.attention and tap.attention:
                    means[f"attention/{name}/{i}"] = self._attention(tap, target, gate)
        values = self._weighed([mean for found in means.values() for mean in found])
        terms = {name: [next(values) for _ in found] for name, found in means.items()}
        return {name: found[0] if len(found) == 1 else torch.stack(found).mean() for name, found in terms.items()}

    def _weighed(self, means: Sequence[_Mean]) -> Iterator[Tensor]:
        values = [mean.value for mean in means]
        if self.weigh is None:
            return iter(values)
        device = values[0].device
        counts = torch.stack([torch.as_tensor(mean.elements(), dtype=torch.float64, device=device) for mean in means])
        return (value * factor for value, factor in zip(values, self.weigh(counts).unbind(), strict=True))

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms; a module's layers are averaged."""
        total = torch.zeros((), device=next(iter(terms.values())).device)
        for name, term in terms.items():
            kind, *place = name.split("/")
            layers = self.pairs[place[0]].student_layers if place else 1
            total = total + getattr(self.config, kind) / layers * term
        return total

    def _prediction(
        self, student: LogitPrediction | LinearPrediction, teacher: LogitPrediction | LinearPrediction
    ) -> _Mean:
        config = self.config
        if isinstance(student, LinearPrediction) and isinstance(teacher, LinearPrediction):
            divergence = linear_kl(
                student.hidden,
                student.weight,
                teacher.hidden,
                teacher.weight,
                bias_s=student.bias,
                bias_t=teacher.bias,
                temperature=config.temperature,
                divergence=config.divergence,
                mask=student.mask,
            )
            assert isinstance(divergence, Tensor)
            mask = student.mask
            return _Mean(divergence, lambda: len(student.hidden) if mask is None else mask.sum())
        if isinstance(student, LogitPrediction) and isinstance(teacher, LogitPrediction):
            divergence = prediction_kl(
                student.logits,
                teacher.logits,
                temperature=config.temperature,
                divergence=config.divergence,
                sample_weight=student.weight,
            )
            weight = student.weight
            return _Mean(divergence, lambda: len(student.logits) if weight is None else weight.sum())
        raise TypeError("student and teacher must both give logits, or both states and a head")

    def _hidden(self, module: str, layer: int, student: LayerTap, teacher: LayerTap, gate: Tensor) -> _Mean:
        projections = self.projections[module]
        assert isinstance(projections, nn.ModuleList)
        projection = projections[layer]
        assert isinstance(projection, nn.Linear)
        error = hidden_mse(
            student.hidden,
            teacher.hidden,
            projection.weight,
            projection.bias,
            normalize=self.config.normalize,
            mask=student.valid,
            gate=gate,
        )
        valid, tokens = student.valid, student.hidden.shape[:-1].numel()
        return _Mean(error, lambda: tokens if valid is None else valid.sum())

    def _attention(self, student: LayerTap, teacher: LayerTap, gate: Tensor) -> list[_Mean]:
        """One loss for each of the layer's maps (a decoder layer has a self- and a cross-attention map)."""
        config = self.config
        # Rows' sums belong to the heads that the forward pass had; regrouped ones have others.
        keep_lse = config.attention_heads != "relation"
        return [
            _Mean(
                attention_map_loss(
                    s.q,
                    s.k,
                    t.q,
                    t.k,
                    kind=config.attention_kind,
                    heads=config.attention_heads,
                    relation_heads=config.relation_heads,
                    causal=s.causal,
                    mask=s.mask,
                    lse_s=s.lse if keep_lse else None,
                    lse_t=t.lse if keep_lse else None,
                    gate=gate,
                ),
                partial(_count_attended, s, config.attention_kind),
            )
            for s, t in zip(student.attention, teacher.attention, strict=True)
        ]


def _count_attended(tap: AttentionTap, kind: Literal["kl", "mse"]) -> Tensor | int:
    """The rows (kl) or elements (mse) of the map that its loss is a mean over, of one head."""
    batch, heads, queries, keys = (*tap.q.shape[:3], tap.k.shape[2])
    if tap.mask is None and (kind == "kl" or not tap.causal):
        return batch * queries * (1 if kind == "kl" else keys)
    attends = attended_elements(queries, keys, tap.causal, tap.mask, None, tap.q.device)
    found = attends.any(dim=-1) if kind == "kl" else attends
    return found.expand(batch, heads, queries, *found.shape[3:]).sum() / heads
