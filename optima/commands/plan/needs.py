"""What a step needs, counted: memory and arithmetic.

The engine's own step runs on fake tensors, which have shapes and no values: the models, losses and optimiser are the
real ones, and every tensor that torch would allocate is counted from its birth to its death. So a model of any size is
planned on a small machine. Checked against real peaks on a CPU (tests/optima/commands/test_plan.py); of GPUs everything
is a prediction.

For a GPU the step is traced as it runs there: fused attention, losses as fused operators. All modules are tapped, as in
the probe and by the largest of arms. What is not counted: the CUDA context, workspaces of libraries, what the allocator
loses to fragmentation, and a fused loss's tiles; `predict.HEADROOM` stands for those.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from optima.coca import CoCa, CoCaConfig, HeadSpec
from optima.coca.pairs import module_pairs
from optima.task import TASKS, Task
from optima.tasks.batches import TaskBatch
from optima.tasks.forward import TaskForward
from optima_core import (
    DistillerConfig,
    Forward,
    LinearPrediction,
    ModulePair,
    Objective,
    Step,
    WantedTaps,
    recompute_activations,
)
from optima_core.objective import Gates
from optima_kernels import as_operators


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


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that were made under it and are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


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
    recompute: bool = False,
    device: Literal["gpu", "cpu"] = "gpu",
) -> Needs:
    """Runs the step of all modules on fake tensors, as it would run on the device.

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

    with FakeTensorMode(), _Memory() as memory:
        teacher = CoCa(teacher_config, heads).eval().requires_grad_(False)
        student = CoCa(student_config, heads).train()
        if recompute:
            recompute_activations(student.transformer_layers())
        work = _Operations(TaskForward(student, task), TaskForward(teacher, task))
        step = _make_step(student, work, module_pairs(student, teacher, layer_map), engine, device)
        gates = _gates(step, engine)
        averaged = 0 if step.average is None else _bytes(step.average.module)
        weights = memory.live - averaged

        probe = load(probe_size)
        taught = step.teach(probe, step.names)
        probe_bytes = memory.live - weights - averaged
        taught_peak = memory.peak

        before = memory.live
        for parameter in step.trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = memory.live - before
        step.optimiser.step()
        step.optimiser.zero_grad(set_to_none=True)
        states = memory.live - before

        memory.peak = memory.live
        step.measure(probe, taught)
        probe_peak = max(taught_peak, memory.peak)

        ahead = _next_taught(step, lambda: load(batch_size), memory) if _is_ahead(engine, device) else 0

        memory.peak = memory.live
        work.forget()
        activations = 0
        for _ in range(min(engine.accumulate, 2)):
            before = memory.live
            batch = load(batch_size)
            losses = step.losses(batch, gates)
            activations = memory.live - before
            with work.counting("backward"):
                step.backward(losses)
            del losses, batch
        step.update(gates)
        step.advance()

    times = engine.accumulate / min(engine.accumulate, 2)
    resident = weights + states + averaged + probe_bytes
    return Needs(
        teacher_parameters=_parameters(teacher),
        student_parameters=_parameters(student),
        projection_parameters=_parameters(step.objective),
        weights=weights,
        gradients=gradients,
        optimiser=states,
        average=averaged,
        probe=probe_bytes,
        activations=activations,
        probe_peak=probe_peak,
        step_peak=memory.peak + ahead,
        teacher_operations=times * work.counts["teacher"],
        student_operations=times * work.counts["student"],
        loss_operations=times * work.losses(step.objective),
        backward_operations=times * work.counts["backward"],
        kept=memory.peak - resident if engine.cuda_graphs and device == "gpu" else 0,
        ahead=ahead,
    )


def _is_ahead(engine: DistillerConfig, device: Literal["gpu", "cpu"]) -> bool:
    return engine.teacher_ahead and not engine.compile and device == "cpu"


def _next_taught(step: Step[TaskBatch], load: Callable[[], TaskBatch], memory: _Memory) -> int:
    """The most that a batch and the teacher's forward of it take."""
    before = memory.peak = memory.live
    step.teach(load(), step.names)
    return memory.peak - before


class _OnGpu(Step[TaskBatch]):
    """The engine's step as it runs on a GPU, though fake tensors are the CPU's.

    Half precision leaves attention fused, which on a CPU it does not; a loss is one operator rather than the many calls
    over tiles.
    """

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(as_operators())
            if self.config.precision != "fp32":
                half = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
                stack.enter_context(torch.autocast("cpu", half))
            yield


def _make_step(
    student: CoCa,
    work: "_Operations",
    pairs: Sequence[ModulePair],
    engine: DistillerConfig,
    device: Literal["gpu", "cpu"],
) -> Step[TaskBatch]:
    eager = dataclasses.replace(
        engine, compile=False, optimiser=dataclasses.replace(engine.optimiser, implementation="adamw")
    )
    return (_OnGpu if device == "gpu" else Step)(student, work.student, work.teacher, pairs, eager)


def _gates(step: Step[TaskBatch], engine: DistillerConfig) -> Gates:
    """Those of all modules; an update behind gates keeps copies."""
    known = engine.read_arm and not engine.compile
    return {name: None if known else torch.ones(()) for name in step.names}


class _Operations:
    """Both models, whose operations it counts, and the shapes of what they show."""

    def __init__(self, student: TaskForward, teacher: TaskForward) -> None:
        self._models = {"student": student, "teacher": teacher}
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self.counts = dict.fromkeys(("teacher", "student", "backward"), 0)
        self._shown: dict[str, list[Any]] = {"student": [], "teacher": []}

    def student(self, batch: TaskBatch, wanted: WantedTaps) -> Forward:
        return self._run("student", batch, wanted)

    def teacher(self, batch: TaskBatch, wanted: WantedTaps) -> Forward:
        return self._run("teacher", batch, wanted)

    def losses(self, objective: Objective) -> int:
        """The operations of the losses of what was shown."""
        pairs = zip(self._shown["student"], self._shown["teacher"], strict=True)
        return sum(_loss_operations(student, teacher, objective) for student, teacher in pairs)

    def _run(self, name: str, batch: TaskBatch, wanted: WantedTaps) -> Forward:
        with self.counting(name):
            output = self._models[name](batch, wanted)
        self._shown[name].append(tree_map_only(Tensor, lambda x: x.shape, output))
        return output

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Adds the operations of the block to a count."""
        aten = torch.ops.aten

        def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
            return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]

        def backward(d_out: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
            return int(sdpa_backward_flop_count(d_out, q, k, v))  # type: ignore[no-untyped-call]

        def linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
            return int(2 * math.prod(x) * weight[0])

        counter = FlopCounterMode(
            display=False,
            custom_mapping={
                torch.ops.mkldnn._linear_pointwise: linear,  # what a CPU may take for fp32
                aten._scaled_dot_product_flash_attention_for_cpu: forward,
                aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
            },
        )
        with counter:
            yield
        self.counts[name] += counter.get_total_flops()


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
            if config.attention:
                for s, t in zip(tap.attention, tapped[layers[i]].attention, strict=True):
                    found += 2 * (3 * math.prod(s.q) * s.k[2] + math.prod(t.q) * t.k[2])
    if config.logits and isinstance(student.prediction, LinearPrediction):
        ours, theirs = student.prediction.hidden, teacher.prediction.hidden
        found += 2 * student.prediction.weight[0] * (3 * math.prod(ours) + math.prod(theirs))
    return found


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
