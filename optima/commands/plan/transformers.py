"""What a step of `distill_hf` needs: both models are made of fake tensors, their inputs are real rows.

A model of transformers looks at the values of its inputs (which words stand for images, how many patches an image has),
so these are there; its weights are not, and neither is what comes of them. A model that looks at those, too, cannot be
planned.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from optima.commands.distill_hf.batches import Batches
from optima.commands.distill_hf.config import PlanHfConfig
from optima.commands.distill_hf.models import (
    load_processor,
    make_empty,
    recompute_layers,
    require_transformers,
    with_adapters,
)
from optima.commands.distill_hf.source import Rows
from optima.commands.plan.needs import Device, Needs, Traced, trace_needs
from optima_core import DistillerConfig
from optima_core.errors import OptimaError


def measure_hf_needs(config: PlanHfConfig) -> Needs:
    """What a step of all modules needs of one device, on the first batch of the data.

    Raises OptimaError if models or data cannot be read, or a model looks at values that come of its weights.
    """
    require_transformers()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    teacher, student = make_empty(config.teacher, "teacher"), make_empty(config.student, "student")
    rows = Rows(config.data, held_every=config.held_every, seed=config.seed, least=config.batch_size)
    processor = load_processor(config.teacher)
    batches = Batches(rows, processor, student, size=config.batch_size, max_length=config.max_length)
    if config.lora:
        with torch.device("meta"):
            student = with_adapters(student, config.lora)
    fill((teacher, student), fake)
    if config.recompute:
        recompute_layers(student)
    device: Device = "cpu" if config.chip == "cpu" else "gpu"
    alone = device == "cpu" and config.threads == 1
    engine = dataclasses.replace(config.engine, teacher_ahead=False) if alone else config.engine
    how = {"names": config.modules or None, "layer_map": config.layer_map}
    return trace_models(teacher, student, batches.load(0), batches.probe(config.probe_size), engine, device, fake, how)


def fill(models: Iterable[Any], fake: FakeTensorMode) -> None:
    """Gives models of the device "meta" fake tensors of a CPU."""
    with fake:
        for model in models:
            model.to_empty(device="cpu")
            model.tie_weights()


def trace_models(
    teacher: nn.Module,
    student: nn.Module,
    batch: dict[str, Any],
    probe: dict[str, Any],
    engine: DistillerConfig,
    device: Device,
    fake: AbstractContextManager[Any],
    pairing: dict[str, Any] | None = None,
) -> Needs:
    """`trace_needs` of two models of transformers, whose tensors `fake` made, on real batches.

    pairing: keyword arguments of `pair_modules`.
    """
    # Nothing else here needs transformers.
    from optima_core.integrations.huggingface import TransformersAdaptor, TransformersForward, pair_modules

    class Planned(TransformersForward):
        """Whether logits are what the head gives cannot be seen without values; of nearly all models they are."""

        def _is_all(self, logits: Tensor, states: Tensor, head: nn.Linear) -> bool:
            return logits.shape[:-1] == states.shape[:-1]

    ours, theirs = TransformersAdaptor(student.train()), TransformersAdaptor(teacher.eval().requires_grad_(False))
    with _told(), _unchecked():
        with _PlacesOfMasks():
            pairs = pair_modules(ours, theirs, probe, **(pairing or {}))
        copies = partial(_copied, batch), partial(_copied, probe)
        traced = Traced(teacher, student, Planned(theirs), Planned(ours), pairs, *copies)
        return trace_needs(traced, engine, device, fake, _PlacesOfMasks())


def _copied(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}


class _PlacesOfMasks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where a real mask chooses among fake values, how many it chooses is known: its places take its place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        return func(*args, **(kwargs or {}))


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    if index is None or index.dtype != torch.bool or type(index) is not Tensor:
        return (index,)
    return index.nonzero(as_tuple=True)


@contextmanager
def _unchecked() -> Iterator[None]:
    """Within, transformers leaves out checks of values that are only there to tell of mistakes."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise OptimaError(
            f"what these models need cannot be counted without weights: they look at values ({error}); try "
            "`distill_hf` with --engine.rounds 1 on the device itself"
        ) from error
