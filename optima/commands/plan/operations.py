"""Counts the arithmetic of a step: a multiplication and an addition are two operations."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from optima_core import Forward, LinearPrediction, Objective, WantedTaps
from optima_core.step import ModelForward


class Operations:
    """Both models, whose operations it counts, and the shapes of what they show."""

    def __init__(self, student: ModelForward[Any], teacher: ModelForward[Any]) -> None:
        self._models = {"student": student, "teacher": teacher}
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self.counts = dict.fromkeys(("teacher", "student", "backward"), 0)
        self._shown: dict[str, list[Any]] = {"student": [], "teacher": []}

    def student(self, batch: Any, wanted: WantedTaps) -> Forward:
        return self._run("student", batch, wanted)

    def teacher(self, batch: Any, wanted: WantedTaps) -> Forward:
        return self._run("teacher", batch, wanted)

    def losses(self, objective: Objective) -> int:
        """The operations of the losses of what was shown."""
        pairs = zip(self._shown["student"], self._shown["teacher"], strict=True)
        return sum(_loss_operations(student, teacher, objective) for student, teacher in pairs)

    def _run(self, name: str, batch: Any, wanted: WantedTaps) -> Forward:
        with self.counting(name):
            output = self._models[name](batch, wanted)
        self._shown[name].append(tree_map_only(Tensor, lambda x: x.shape, output))
        return output

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Adds the operations of the block to a count."""
        with matrix_operations() as counter:
            yield
        self.counts[name] += counter.get_total_flops()


def matrix_operations() -> FlopCounterMode:
    """While entered, counts those of products and attention, on fake tensors, too."""
    aten = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]

    def backward(d_out: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(d_out, q, k, v))  # type: ignore[no-untyped-call]

    def linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return int(2 * math.prod(x) * weight[0])

    found = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.mkldnn._linear_pointwise: linear,  # what a CPU may take for fp32
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )
    found.mod_tracker = _Whole()  # type: ignore[assignment]
    return found


class _Whole:
    """In place of what tells the modules apart, which cannot follow all of them (BLIP-2's queries)."""

    parents: ClassVar = {"Global"}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _loss_operations(student: Any, teacher: Any, objective: Objective) -> int:
    """The matrix products in the losses' definitions and in their gradients, each once.

    student, teacher: what `Forward` is, with shapes in the place of tensors.
    """
    config, found = objective.config, 0
    for module, taps in student.taps.items():
        layers = objective.pairs[module].teacher_layer_of()
        tapped = dict(zip(sorted(set(layers)), teacher.taps[module], strict=True))
        for i, tap in enumerate(taps):
            if config.hidden:
                found += 6 * math.prod(tap.hidden) * tapped[layers[i]].hidden[-1]
            if config.attention and objective.pairs[module].maps:
                for s, t in zip(tap.attention, tapped[layers[i]].attention, strict=True):
                    found += 2 * (3 * math.prod(s.q) * s.k[2] + math.prod(t.q) * t.k[2])
    if config.logits and isinstance(student.prediction, LinearPrediction):
        ours, theirs = student.prediction.hidden, teacher.prediction.hidden
        found += 2 * student.prediction.weight[0] * (3 * math.prod(ours) + math.prod(theirs))
    return found
