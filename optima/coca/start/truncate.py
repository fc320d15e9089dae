"""A student of the leading features, heads and hidden units of its teacher's layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optima.coca.heads import ClassificationHead
from optima.coca.layers import CrossAttention, SelfAttention
from optima.coca.model import CoCa
from optima.coca.pairs import module_pairs

LAYERS = {"image_encoder": "blocks", "text_decoder": "blocks", "multimodal_decoder": "layers"}
"""Where each module keeps its layers."""


@torch.no_grad()
def truncate_teacher(student: CoCa, teacher: CoCa, layer_map: str | Mapping[str, Sequence[int]] = "uniform") -> None:
    """Overwrites the student's weights by the leading parts of its teacher's; what the teacher lacks stays as it is.

    Raises ValueError if a module of the student is deeper than the teacher's, or if images become other tokens.
    """
    refuse_other_images(student, teacher)
    theirs = dict(teacher.named_parameters())
    counterpart = counterparts(student, teacher, layer_map)
    for name, target in student.named_parameters():
        source = theirs.get(counterpart(name))
        if source is None:
            continue
        if name == "text_decoder.position":
            target[-1:, : source.shape[1]] = source[-1:, : target.shape[1]]
            _copy_leading(target[:-1], source[:-1])
        else:
            _copy_leading(_by_head(student, name, target), _by_head(teacher, counterpart(name), source))


def counterparts(student: CoCa, teacher: CoCa, layer_map: str | Mapping[str, Sequence[int]]) -> "Counterparts":
    """From the parts of a student to those of the teacher, by the layer map of distillation."""
    return Counterparts({pair.name: pair.teacher_layer_of() for pair in module_pairs(student, teacher, layer_map)})


class Counterparts:
    """From the name of a part of the student to that of the teacher."""

    def __init__(self, layers: dict[str, tuple[int, ...]]) -> None:
        self.layers = layers

    def __call__(self, name: str) -> str:
        module, _, rest = name.partition(".")
        kind, _, rest = rest.partition(".")
        if LAYERS.get(module) != kind:
            return name
        index, _, rest = rest.partition(".")
        return ".".join(filter(None, (module, kind, str(self.layers[module][int(index)]), rest)))


def _copy_leading(target: Tensor, source: Tensor) -> None:
    common = tuple(slice(min(sizes)) for sizes in zip(target.shape, source.shape, strict=True))
    target[common] = source[common]


def _by_head(model: CoCa, name: str, tensor: Tensor) -> Tensor:
    """A view of a projection that shows its parts (q, k, v), heads and images as dimensions; others as they are."""
    parent, _, kind = name.rpartition(".")
    grandparent, _, role = parent.rpartition(".")
    owner = model.get_submodule(grandparent)
    if isinstance(owner, SelfAttention | CrossAttention):
        if role == "out":
            return tensor.view(len(tensor), owner.heads, -1) if kind == "weight" else tensor
        return tensor.view(len(role), owner.heads, -1, *tensor.shape[1:])  # "qkv", "q" and "kv" name their parts
    head = model.get_submodule(grandparent.rpartition(".")[0]) if role == "0" else None
    if isinstance(head, ClassificationHead) and kind == "weight":
        return tensor.view(len(tensor), head.images, -1)
    return tensor


def refuse_other_images(student: CoCa, teacher: CoCa) -> None:
    """Raises ValueError if images become other tokens in the student."""
    ours, theirs = student.config.image_encoder, teacher.config.image_encoder
    for name in ("mean", "std", "norm_input", "norm_tokens"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"image_encoder.{name}: the student's {getattr(ours, name)} differs from the teacher's "
                f"{getattr(theirs, name)}; its weights would see other images"
            )
