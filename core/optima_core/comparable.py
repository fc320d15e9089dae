"""Which hidden states and attention maps can be compared, and which in one call."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optima_core.errors import OptimaError
from optima_core.taps import AttentionTap, LayerTap

Pairs = Sequence[tuple[LayerTap, LayerTap]]
"""Taps of a module's student layers, each with that of the teacher layer it learns from."""


def alike_layers(pairs: Pairs) -> dict[tuple[int, ...], list[tuple[LayerTap, LayerTap]]]:
    """The layers that have attention maps, together where those are as many, of equal batches, and alike otherwise."""
    found: dict[object, list[int]] = {}
    for layer, (student, teacher) in enumerate(pairs):
        if student.attention:
            kinds = [
                (len(s.q), s.causal, s.scale, t.scale)
                for s, t in zip(student.attention, teacher.attention, strict=True)
            ]
            found.setdefault(tuple(kinds), []).append(layer)
    return {tuple(layers): [pairs[layer] for layer in layers] for layers in found.values()}


def refuse_other_tokens(module: str, pairs: Pairs) -> None:
    """Raises OptimaError if a student's layer has other tokens than its teacher's."""
    for layer, (student, teacher) in enumerate(pairs):
        ours, theirs = (list(tap.hidden.shape[:-1]) for tap in (student, teacher))
        if ours != theirs:
            raise OptimaError(
                f"module {module}, student layer {layer}: the student has {ours} tokens, the teacher {theirs}; "
                "a module is distilled token by token, so give both the same input, or leave the module out"
            )


def refuse_other_maps(module: str, pairs: Pairs) -> None:
    """Raises OptimaError for maps that are more than softmax(scale * q k^T + mask), or that no other map answers."""
    for layer, (student, teacher) in enumerate(pairs):
        where = f"module {module}, student layer {layer}"
        if len(student.attention) != len(teacher.attention):
            raise OptimaError(
                f"{where}: the student has {len(student.attention)} attention maps and the teacher's layer "
                f"{len(teacher.attention)}; take objective.attention 0, or another layer_map"
            )
        for ours, theirs in zip(student.attention, teacher.attention, strict=True):
            for side, tap in (("student", ours), ("teacher", theirs)):
                if tap.unlike:
                    raise OptimaError(
                        f"{where}: the {side}'s map is not softmax(q k^T) alone: {tap.unlike}; take "
                        "objective.attention 0 and distil hidden states"
                    )
            _refuse_other_size(where, ours, theirs)


def differing_masks(module: str, pairs: Pairs) -> dict[str, Tensor]:
    """By layer in words, the share of pairs of tokens that one model attends to and the other does not, 0-d."""
    return {
        f"module {module}, student layer {layer}": torch.stack(
            [
                (_attends(ours) != _attends(theirs)).float().mean()
                for ours, theirs in zip(student.attention, teacher.attention, strict=True)
            ]
        ).max()
        for layer, (student, teacher) in enumerate(pairs)
        if student.attention
    }


def refuse_other_masks(differing: Mapping[str, float]) -> None:
    """Raises OptimaError, naming the layer, if a share of `differing_masks` is not 0."""
    for where, share in differing.items():
        if share:
            raise OptimaError(
                f"{where}: student and teacher attend to different pairs of tokens ({share:.1%} of them: another "
                "window, causality or padding); give both the same, or take objective.attention 0"
            )


def _refuse_other_size(where: str, ours: AttentionTap, theirs: AttentionTap) -> None:
    student, teacher = ((tap.q.shape[2], tap.k.shape[2]) for tap in (ours, theirs))
    if student != teacher:
        raise OptimaError(
            f"{where}: the student's map has {student[0]} queries and {student[1]} keys, the teacher's {teacher[0]} "
            f"and {teacher[1]}; both must see the same tokens, else take objective.attention 0"
        )


def _attends(tap: AttentionTap) -> Tensor:
    """bool, broadcasts to [B, H, N, M]."""
    found = torch.ones(1, 1, tap.q.shape[2], tap.k.shape[2], dtype=torch.bool, device=tap.q.device)
    found = found.tril() if tap.causal else found
    return found if tap.mask is None else found & tap.mask
