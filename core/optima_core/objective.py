"""The objective: task loss, prediction distillation, and the layer losses of the modules chosen this round.

L = w_task * task + w_logits * logits + sum over the chosen modules of (s_hidden * w_hidden * hidden +
s_attention * w_attention * attention)

The layer losses are means over a module's layers, so that the weights mean the same for a shallow and a deep module.
The layers of a module are compared in one call a kind. A module's terms may carry a gate on the device: 1 where the
module is distilled this round, else 0. The strengths lie on the device, too, and may change between steps.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from optima_core.comparable import alike_layers, differing_masks, refuse_other_maps, refuse_other_tokens
from optima_core.config import ObjectiveConfig
from optima_core.errors import OptimaError
from optima_core.modules import ModulePair
from optima_core.taps import AttentionTap, LayerTap, Taps, WantedTaps
from optima_core.terms import LAYER_KINDS, LossGroup, LossKind, LossTerm, record_order
from optima_kernels import attention_map_losses, hidden_mses, linear_kl, prediction_kl

Gates = Mapping[str, Tensor | None]
"""Module name -> its gate, 0-d; None where the host knows that the module is distilled, and no gate is needed."""

Losses = dict[LossGroup, Tensor]
"""The unweighted losses of a step."""


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

    task_loss: scalar; None where there are no labels, and of a teacher, whose is not used.
    prediction: None where predictions are not to be distilled.
    taps: module name -> taps of the wanted layers.
    task_count: the number of tokens or items that task_loss is a mean over, 0-d if a tensor; None where it is the same
        on all ranks.
    """

    task_loss: Tensor | None
    prediction: LogitPrediction | LinearPrediction | None
    taps: Taps
    task_count: Tensor | int | None = None


class LossVector(NamedTuple):
    """Losses in the order in which records list them. values: float32 [terms], without a gradient."""

    terms: tuple[LossTerm, ...]
    values: Tensor

    def named(self) -> dict[str, float]:
        """The losses by their names in records; waits for the device."""
        return dict(zip((term.name for term in self.terms), self.values.tolist(), strict=True))


def as_vector(losses: Losses) -> LossVector:
    """The losses as one vector."""
    order = record_order(tuple(losses))
    parts = {group: value.detach().float().flatten().unbind() for group, value in losses.items()}
    return LossVector(
        tuple(term for term, _, _ in order), torch.stack([parts[group][place] for _, group, place in order])
    )


class _Means(NamedTuple):
    """Losses that are means, [layers] or 0-d, and over how many elements each (up to a factor common to all ranks)."""

    values: Tensor
    elements: Callable[[], Sequence[Tensor | int]]


class Objective(nn.Module):
    """Holds the learned projections from student to teacher width, one a layer, and computes the losses.

    Projections start as the identity where both widths are equal, else from random numbers.

    weigh: counts [means] -> factors [means] that the means are multiplied by, for batches that are slices of a larger
        one (`optima_core.parallel.Ranks.weigh`); None leaves them as they are.

    strengths: float32 [modules, 2], 1 at first, a factor of each module's hidden-state and attention-map losses; to be
        written in place.
    """

    strengths: Tensor

    def __init__(
        self,
        modules: Sequence[ModulePair],
        config: ObjectiveConfig,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.weigh = weigh
        self._differing: dict[str, Tensor] | None = None
        self.register_buffer("strengths", torch.ones(len(modules), len(LAYER_KINDS)), persistent=False)
        self.pairs = {pair.name: pair for pair in modules}
        if len(self.pairs) != len(modules):
            raise ValueError(f"modules must have different names, got {[pair.name for pair in modules]}")
        self.projections = nn.ModuleDict(
            {
                pair.name: nn.ModuleList(
                    _projection(pair.student_width, pair.teacher_width) for _ in range(pair.student_layers)
                )
                for pair in modules
            }
        )

    def wanted(self, modules: Sequence[str]) -> tuple[WantedTaps, WantedTaps]:
        """The taps that distilling these modules needs: of the student, and of the teacher."""
        student = {name: tuple(range(self.pairs[name].student_layers)) for name in modules}
        teacher = {name: tuple(sorted(set(self.pairs[name].teacher_layer_of()))) for name in modules}
        return student, teacher

    def forward(self, student: Forward, teacher: Forward, gates: Gates) -> Losses:
        """The unweighted losses; but for the task's, one of weight 0 is left out.

        gates: of the modules that are compared, which must have been tapped.

        Raises OptimaError if there is nothing to learn from, or a map cannot be compared.
        """
        config, task_count = self.config, student.task_count
        found: dict[LossGroup, list[_Means]] = {}
        if student.task_loss is not None:
            found[LossGroup("task")] = [_Means(student.task_loss, lambda: [1 if task_count is None else task_count])]
        if config.logits and student.prediction is not None and teacher.prediction is not None:
            found[LossGroup("logits")] = [self._prediction(student.prediction, teacher.prediction)]
        for name, gate in gates.items():
            pairs = self._pairs(name, student, teacher)
            if config.hidden:
                refuse_other_tokens(name, pairs)
                found[LossGroup("hidden", name, tuple(range(len(pairs))))] = [self._hidden(name, pairs, gate)]
            if config.attention and self.pairs[name].maps:
                # A call compares maps of one kind: those of layers whose attentions are alike, first with first.
                refuse_other_maps(name, pairs)
                if self._differing is not None:
                    self._differing |= differing_masks(name, pairs)
                for layers, alike in alike_layers(pairs).items():
                    found[LossGroup("attention", name, layers)] = [
                        self._attention(alike, place, gate) for place in range(len(alike[0][0].attention))
                    ]
        if not found:
            raise OptimaError(
                "there is no loss to learn from: no task loss, no predictions, and no module with a layer loss of a "
                "weight above 0"
            )
        return {group: _mean(means) for group, means in self._weighed(found).items()}

    @contextlib.contextmanager
    def comparing_masks(self) -> Iterator[dict[str, Tensor]]:
        """Within, a forward pass fills in what `optima_core.comparable.refuse_other_masks` asks for."""
        self._differing = {}
        try:
            yield self._differing
        finally:
            self._differing = None

    def weight(self, group: LossGroup | LossTerm) -> float:
        """The factor of a loss in the total at strength 1; that of a layer is its share of the module's mean."""
        weight: float = getattr(self.config, group.kind)
        return weight if group.module is None else weight / self.pairs[group.module].student_layers

    def total(self, losses: Losses) -> Tensor:
        """The weighted sum of the losses."""
        total = torch.zeros((), device=next(iter(losses.values())).device)
        for group, values in losses.items():
            weighted = self.weight(group) * (values.sum() if group.layers else values)
            total = total + (weighted if group.module is None else self.strength(group.module, group.kind) * weighted)
        return total

    def strength(self, module: str, kind: LossKind) -> Tensor:
        """The place of a part's strength in `strengths`, 0-d."""
        return self.strengths[list(self.pairs).index(module), LAYER_KINDS.index(kind)]

    def _pairs(self, module: str, student: Forward, teacher: Forward) -> list[tuple[LayerTap, LayerTap]]:
        """Each student layer's tap with that of the teacher layer it learns from."""
        layers = self.pairs[module].teacher_layer_of()
        tapped = dict(zip(sorted(set(layers)), teacher.taps[module], strict=True))
        return [(tap, tapped[layer]) for tap, layer in zip(student.taps[module], layers, strict=True)]

    def _weighed(self, found: dict[LossGroup, list[_Means]]) -> dict[LossGroup, list[Tensor]]:
        means = [mean for of_group in found.values() for mean in of_group]
        values = iter([mean.values for mean in means])
        if self.weigh is not None:
            counts = [list(mean.elements()) for mean in means]
            device = means[0].values.device
            factors = self.weigh(torch.stack([_count(x, device) for row in counts for x in row]))
            shares = torch.split(factors, [len(row) for row in counts])
            values = iter([mean.values * share.view_as(mean.values) for mean, share in zip(means, shares, strict=True)])
        return {group: [next(values) for _ in of_group] for group, of_group in found.items()}

    def _prediction(
        self, student: LogitPrediction | LinearPrediction, teacher: LogitPrediction | LinearPrediction
    ) -> _Means:
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
            return _Means(divergence, lambda: [len(student.hidden) if mask is None else mask.sum()])
        if isinstance(student, LogitPrediction) and isinstance(teacher, LogitPrediction):
            divergence = prediction_kl(
                student.logits,
                teacher.logits,
                temperature=config.temperature,
                divergence=config.divergence,
                sample_weight=student.weight,
            )
            weight = student.weight
            return _Means(divergence, lambda: [len(student.logits) if weight is None else weight.sum()])
        raise TypeError("student and teacher must both give logits, or both states and a head")

    def _hidden(self, module: str, pairs: Sequence[tuple[LayerTap, LayerTap]], gate: Tensor | None) -> _Means:
        projections = self.projections[module]
        assert isinstance(projections, nn.ModuleList)
        students = [student for student, _ in pairs]
        errors = hidden_mses(
            [student.hidden for student in students],
            [teacher.hidden for _, teacher in pairs],
            [projection.weight for projection in projections],  # type: ignore[misc]
            [projection.bias for projection in projections],  # type: ignore[misc]
            normalize=self.config.normalize,
            mask=[student.valid for student in students],
            gate=_of_layers(gate, len(pairs)),
        )
        return _Means(
            errors, lambda: [s.hidden.shape[:-1].numel() if s.valid is None else s.valid.sum() for s in students]
        )

    def _attention(self, pairs: Sequence[tuple[LayerTap, LayerTap]], place: int, gate: Tensor | None) -> _Means:
        """The losses of the maps in one place of each layer (a decoder layer has a self- and a cross-attention map)."""
        config = self.config
        ours, theirs = ([tap.attention[place] for tap in taps] for taps in zip(*pairs, strict=True))
        # Rows' sums belong to the heads that the forward pass had; regrouped ones have others.
        keep_lse = config.attention_heads != "relation"
        losses = attention_map_losses(
            [s.q for s in ours],
            [s.k for s in ours],
            [t.q for t in theirs],
            [t.k for t in theirs],
            kind=config.attention_kind,
            heads=config.attention_heads,
            relation_heads=config.relation_heads,
            causal=ours[0].causal,
            mask=[s.mask for s in ours],
            scale_s=ours[0].scale,
            scale_t=theirs[0].scale,
            lse_s=[s.lse if keep_lse else None for s in ours],
            lse_t=[t.lse if keep_lse else None for t in theirs],
            gate=_of_layers(gate, len(pairs)),
        )
        return _Means(losses, partial(_count_attended, ours, config.attention_kind))


def _projection(student: int, teacher: int) -> nn.Linear:
    """From one width to another: the identity at first where they are equal, else random.

    A student that is cut out of its teacher speaks its language already.
    """
    projection = nn.Linear(student, teacher)
    if student == teacher:
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)
    return projection


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(dim=0)


def _of_layers(gate: Tensor | None, layers: int) -> Tensor | None:
    return None if gate is None else gate.repeat(layers)


def _count(elements: Tensor | int, device: torch.device) -> Tensor:
    """0-d, float64. A number is filled in by the device; as a tensor of the host's it would be waited for."""
    if isinstance(elements, Tensor):
        return elements.to(torch.float64)
    return torch.full((), elements, dtype=torch.float64, device=device)


def _count_attended(taps: Sequence[AttentionTap], kind: Literal["kl", "mse"]) -> list[Tensor | int]:
    """The rows (kl) or elements (mse) of each map that its loss is a mean over, of one head."""
    return [_attended(tap, kind) for tap in taps]


def _attended(tap: AttentionTap, kind: Literal["kl", "mse"]) -> Tensor | int:
    batch, heads, queries, keys = (*tap.q.shape[:3], tap.k.shape[2])
    if tap.mask is None and (kind == "kl" or not tap.causal):
        return batch * queries * (1 if kind == "kl" else keys)
    attends = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=tap.q.device)
    if tap.causal:
        attends = attends.tril()
    if tap.mask is not None:
        attends = attends & tap.mask
    found = attends.any(dim=-1) if kind == "kl" else attends
    return found.expand(batch, heads, *found.shape[2:]).sum() / heads
