"""Which parts of a student learn from which parts of a teacher: those of one name, measured on one batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optima_core.comparable import refuse_other_tokens
from optima_core.errors import OptimaError
from optima_core.integrations.huggingface.adaptor import TransformersAdaptor
from optima_core.modules import ModulePair
from optima_core.taps import LayerTap


def pair_modules(
    student: TransformersAdaptor,
    teacher: TransformersAdaptor,
    batch: Mapping[str, Any],
    *,
    teacher_batch: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    layer_map: str | Sequence[int] = "uniform",
) -> list[ModulePair]:
    """The modules of `names`, or else all that both models have, with their widths, which one pass of each tells.

    batch: keyword arguments of both models, or of the student alone where `teacher_batch` is given.

    Raises OptimaError if a module is in one model only, sees other tokens there, or has fewer layers.
    """
    common = [name for name in student.modules if name in teacher.modules] if names is None else list(names)
    for name in common or ["any"]:
        if name not in student.modules or name not in teacher.modules:
            raise OptimaError(
                f"there is no module {name!r} in both models: the student has {', '.join(student.modules)}, the "
                f"teacher {', '.join(teacher.modules)}; name layers alike with TransformersAdaptor(model, modules)"
            )
    ours = _first_layers(student, common, batch)
    theirs = _first_layers(teacher, common, batch if teacher_batch is None else teacher_batch)
    pairs = []
    for name in common:
        refuse_other_tokens(name, [(ours[name], theirs[name])])
        width, teacher_width = (tap[name].hidden.shape[-1] for tap in (ours, theirs))
        pairs.append(ModulePair(name, student.depth(name), teacher.depth(name), width, teacher_width, layer_map))
    return pairs


def _first_layers(adaptor: TransformersAdaptor, names: Sequence[str], batch: Mapping[str, Any]) -> dict[str, LayerTap]:
    training = [module for module in adaptor.model.modules() if module.training]
    adaptor.model.eval()
    with torch.no_grad():
        _, taps = adaptor.run(dict.fromkeys(names, (0,)), **batch)
    for module in training:
        module.training = True
    return {name: taps[name][0] for name in names}
