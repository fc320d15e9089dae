"""What a step needs, counted: memory and arithmetic.

The engine's own step runs on fake tensors, which have shapes and no values: the models, losses and optimiser are the
real ones, and every tensor that torch would allocate is counted from its birth to its death. So a model of any size is
planned on a small machine. Checked against real peaks on a CPU (tests/optima/commands/test_plan.py); of GPUs everything
is a prediction.

For a GPU the step is traced as it runs there: fused attention, losses as fused operators. All modules are tapped, as in
the probe and by the largest of arms. Where layer losses are balanced, the step that looks at the gradients of each part
of them is traced, too, and counts for the memory; its time, once a round, is not in that of a step. What is not
counted: the CUDA context, workspaces of libraries, what the allocator loses to fragmentation, and a fused loss's tiles;
`predict.HEADROOM` stands for those.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optima.coca import CoCa, CoCaConfig, HeadSpec
from optima.coca.pairs import module_pairs
from optima.commands.plan.memory import Memory
from optima.commands.plan.operations import Operations
from optima.task import TASKS, Task
from optima.tasks.batches import TaskBatch
from optima.tasks.forward import TaskForward
from optima_core import DistillerConfig, ModulePair, Step, recompute_activations
from optima_core.config import Precision
from optima_core.objective import Gates
from optima_core.step import ModelForward
from optima_kernels import as_operators

Device = Literal["gpu", "cpu"]
"""Where a step is to run."""


@dataclass(frozen=True)
class Needs:
    """What a step needs. Sizes in bytes; parameters and operations (a multiplication and an addition are two) counted.

    weights: both models and the projections. probe: the held batch and what the teacher shows of it. activations: what
    a batch's forward passes and losses leave for the backward pass. probe_peak, step_peak: the most alive at once while
    the held batch is measured, which the batch size does not change, and in a step. kept: by recorded steps (CUDA
    graphs) between replays. ahead: of step_peak, what a CPU takes to run the teacher on the next batch meanwhile.
    """

    teacher_parameters: int
    student_parameters: int
    projection_parameters: int
    weights: int
    gradients: int
    optimiser: int
    average: int
    probe: int
    activations: int
    probe_peak: int
    step_peak: int
    teacher_operations: float
    student_operations: float
    loss_operations: float
    backward_operations: float
    kept: int = 0
    ahead: int = 0

    @property
    def operations(self) -> float:
        """Of a whole optimiser step."""
        return self.teacher_operations + self.student_operations + self.loss_operations + self.backward_operations

    @property
    def peak(self) -> int:
        """The most alive at once, from the start on: a recorded step lies beside the first steps of another arm."""
        return max(self.probe_peak, self.step_peak) + self.kept

    @property
    def resident(self) -> int:
        """Alive between steps."""
        return self.weights + self.optimiser + self.average + self.probe


class Traced(NamedTuple):
    """Two models of fake tensors, and what the engine is given of them.

    batch, probe: make a batch of a step, and the held one, anew.
    """

    teacher: nn.Module
    student: nn.Module
    teacher_forward: ModelForward[Any]
    student_forward: ModelForward[Any]
    pairs: Sequence[ModulePair]
    batch: Callable[[], Any]
    probe: Callable[[], Any]


def measure_needs(
    teacher_config: CoCaConfig,
    student_config: CoCaConfig,
    task: Task,
    *,
    batch_size: int,
    probe_size: int,
    text_length: int,
    classes: int,
    engine: DistillerConfig,
    layer_map: str | Mapping[str, Sequence[int]] = "uniform",
    single_layer_maps: bool = False,
    recompute: bool = False,
    device: Device = "gpu",
) -> Needs:
    """`trace_needs` of two CoCas.

    Raises ValueError if the two models cannot be paired or the losses refuse their heads.
    """
    images = TASKS[task].images
    heads: dict[str, HeadSpec] = {task: HeadSpec(classes, images)} if classes else {}
    size = student_config.image_encoder.image_size

    def load(items: int) -> TaskBatch:
        return TaskBatch(
            torch.empty(items, images, 3, size, size),
            torch.ones(items, text_length, dtype=torch.int64),
            torch.zeros(items, dtype=torch.int64),
        )

    fake = FakeTensorMode()
    with fake:
        teacher = CoCa(teacher_config, heads).eval().requires_grad_(False)
        student = CoCa(student_config, heads).train()
    if recompute:
        recompute_activations(student.transformer_layers())
    traced = Traced(
        teacher,
        student,
        TaskForward(teacher, task),
        TaskForward(student, task),
        module_pairs(student, teacher, layer_map, single_layer_maps),
        partial(load, batch_size),
        partial(load, probe_size),
    )
    return trace_needs(traced, engine, device, fake, fake)


def trace_needs(
    traced: Traced,
    engine: DistillerConfig,
    device: Device,
    fake: AbstractContextManager[Any],
    running: AbstractContextManager[Any],
) -> Needs:
    """Runs the step of all modules, as it would run on the device.

    fake: what the models' tensors were made by. running: entered, several times, while models run.
    """
    memory = Memory()
    memory.add(traced.teacher, traced.student)
    work = Operations(traced.student_forward, traced.teacher_forward)
    with fake, memory:
        step = _make_step(traced.student, work, traced.pairs, engine, device)
        gates = _gates(step, engine)
        averaged = 0 if step.average is None else _bytes(step.average.module)
        weights = memory.live - averaged

    with running, memory:
        probe = traced.probe()
        taught = step.teach(probe, step.names)
        probe_bytes = memory.live - weights - averaged
        taught_peak = memory.peak

        gradients, states = _optimised(step, memory)

        memory.peak = memory.live
        step.measure(probe, taught)
        probe_peak = max(taught_peak, memory.peak)

        ahead = _next_taught(step, traced.batch, memory) if _is_ahead(engine, device) else 0

        memory.peak = memory.live
        work.forget()
        activations = 0
        for _ in range(min(engine.accumulate, 2)):
            before = memory.live
            batch = traced.batch()
            losses = step.losses(batch, gates)
            activations = memory.live - before
            with work.counting("backward"):
                step.backward(losses)
            parts = dict.fromkeys((group.module, group.kind) for group in losses if group.module is not None)
            looks = engine.balance == "gradient" and len(losses) > len(parts)
            del losses, batch
        step.update(gates)
        step.advance()

        counts, of_losses = dict(work.counts), work.losses(step.objective)
        if looks:
            # Once a round the gradients of each part are looked at, for which the graph and more gradients are kept.
            batches = [traced.batch() for _ in range(min(engine.accumulate, 2))]
            step.learn_apart(batches, gates, list(parts), lambda *_: torch.ones(()))

    times = engine.accumulate / min(engine.accumulate, 2)
    resident = weights + states + averaged + probe_bytes
    return Needs(
        teacher_parameters=_parameters(traced.teacher),
        student_parameters=_parameters(traced.student),
        projection_parameters=_parameters(step.objective),
        weights=weights,
        gradients=gradients,
        optimiser=states,
        average=averaged,
        probe=probe_bytes,
        activations=activations,
        probe_peak=probe_peak,
        step_peak=memory.peak + ahead,
        teacher_operations=times * counts["teacher"],
        student_operations=times * counts["student"],
        loss_operations=times * of_losses,
        backward_operations=times * counts["backward"],
        kept=memory.peak - resident if engine.cuda_graphs and device == "gpu" else 0,
        ahead=ahead,
    )


def _optimised(step: Step[Any], memory: Memory) -> tuple[int, int]:
    """Bytes of the gradients, while there are some, and of what the optimiser keeps."""
    before = memory.live
    for parameter in step.trained:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gradients = memory.live - before
    step.optimiser.step()
    step.optimiser.zero_grad(set_to_none=True)
    return gradients, memory.live - before


def _is_ahead(engine: DistillerConfig, device: Device) -> bool:
    return engine.teacher_ahead and not engine.compile and device == "cpu"


def _next_taught(step: Step[Any], load: Callable[[], Any], memory: Memory) -> int:
    """The most that a batch and the teacher's forward of it take."""
    before = memory.peak = memory.live
    step.teach(load(), step.names)
    return memory.peak - before


class _OnGpu(Step[Any]):
    """The engine's step as it runs on a GPU, though fake tensors are the CPU's.

    Half precision leaves attention fused, which on a CPU it does not; a loss is one operator rather than the many calls
    over tiles.
    """

    def arithmetic(self) -> AbstractContextManager[None]:
        return gpu_arithmetic(self.config.precision)


@contextlib.contextmanager
def gpu_arithmetic(precision: Precision | Literal["fp16"]) -> Iterator[None]:
    """What `optima_core.precision.arithmetic` is on a GPU, for fake tensors, and losses as fused operators."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_operators())
        if precision != "fp32":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16 if precision == "bf16" else torch.float16))
        yield


def _make_step(
    student: nn.Module, work: Operations, pairs: Sequence[ModulePair], engine: DistillerConfig, device: Device
) -> Step[Any]:
    eager = dataclasses.replace(
        engine, compile=False, optimiser=dataclasses.replace(engine.optimiser, implementation="adamw")
    )
    return (_OnGpu if device == "gpu" else Step)(student, work.student, work.teacher, pairs, eager)


def _gates(step: Step[Any], engine: DistillerConfig) -> Gates:
    """Those of all modules; an update behind gates keeps copies."""
    known = engine.read_arm and not engine.compile
    return {name: None if known else torch.ones(()) for name in step.names}


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
