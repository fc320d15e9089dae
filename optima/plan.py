"""What a distillation will need, before anyone rents a GPU: memory, arithmetic, and a predicted time a step.

The step runs on fake tensors, which have shapes and no values: the models, losses and optimiser are the real ones, and
every tensor that torch would allocate is counted from its birth to its death. So a model of any size is planned on a
small machine. Checked against real peaks on a CPU (tests/optima/test_plan.py); of GPUs everything is a prediction.

For a GPU the step is traced as it runs there: fused attention, losses as fused operators, all modules tapped. What is
not counted: the CUDA context, workspaces of libraries, what the allocator loses to fragmentation, and a fused loss's
tiles; `HEADROOM` stands for those.
"""

import contextlib
import dataclasses
import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from optima.coca import CoCa, CoCaConfig, HeadSpec
from optima.coca.checkpoint import load_coca
from optima.coca.pairs import module_pairs
from optima.coca.presets import preset
from optima.tasks import Task
from optima.tasks.batches import TaskBatch
from optima.tasks.forward import TaskForward
from optima_core import DistillerConfig, ObjectiveConfig
from optima_core.objective import Forward, LinearPrediction, Objective
from optima_core.optimiser import clip_gradients, make_optimiser
from optima_core.precision import arithmetic

GIB = 2**30
HEADROOM = 1.1
"""Memory that a step takes on a GPU beside its tensors, as a factor; our assumption."""

CLASSES: dict[Task, int] = {"captioning": 0, "vqa": 3129, "nlvr2": 2, "snli_ve": 3}
"""Classes of a task's head: for VQA the answers that most models of VQAv2 choose from."""


class Gpu(NamedTuple):
    """Makers' figures. memory: GB. bf16, fp32: dense 10**12 operations a second. bandwidth: 10**12 bytes a second."""

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float


GPUS = (
    Gpu("A100 SXM 80 GB", 80, 312, 19.5, 2.04),
    Gpu("H100 SXM 80 GB", 80, 989, 67, 3.35),
    Gpu("B200 180 GB", 180, 2250, 75, 8.0),
)


def _default_engine() -> DistillerConfig:
    return DistillerConfig(precision="bf16", objective=ObjectiveConfig(attention_heads="mean"))


@dataclass(frozen=True)
class PlanConfig:
    """A distillation on one GPU.

    Attributes:
        teacher: Name of a preset, or a .safetensors file of OPTIMA whose sizes count.
        student: The same; base, tiny12 and tiny6 take the teacher's patches.
        task: What the student is to learn.
        batch_size: Items a GPU and batch.
        probe_size: Items of the held batch that rewards are measured on; what the teacher shows of it is kept.
        text_length: Tokens in a row of text; 0 takes the longest that both models read.
        classes: Classes of the task's head; 0 takes those of the benchmark (3129 answers for VQA).
        layer_map: "uniform" spreads the student's layers over the teacher's, "last" pairs them with the last ones.
        engine: Precision, accumulation, losses and optimiser as `distill` takes them.
        memory: Memory of the GPU that the step must fit, GB.
        utilisation: Share of a GPU's peak arithmetic that is assumed to be reached, in (0, 1].
        json: Print the figures as JSON instead of tables.
    """

    teacher: str = "coca_ViT-L-14"
    student: str = "tiny12"
    task: Task = "vqa"
    batch_size: int = 64
    probe_size: int = 64
    text_length: int = 0
    classes: int = 0
    layer_map: Literal["uniform", "last"] = "uniform"
    engine: DistillerConfig = field(default_factory=_default_engine)
    memory: float = 80.0
    utilisation: float = 0.4
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "probe_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("text_length", "classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.memory < math.inf:
            raise ValueError(f"memory must be a finite number of GB above 0, got {self.memory}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation must be in (0, 1], got {self.utilisation}")


@dataclass(frozen=True)
class Needs:
    """What a step needs. Sizes in bytes; parameters and operations (a multiplication and an addition are two) counted.

    weights: both models and the projections. probe: the held batch and what the teacher shows of it. activations: what
    a batch's forward passes and losses leave for the backward pass. peak: the most alive at once, from the start on.
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
    peak: int
    teacher_operations: float
    student_operations: float
    loss_operations: float
    backward_operations: float

    @property
    def operations(self) -> float:
        """Of a whole optimiser step."""
        return self.teacher_operations + self.student_operations + self.loss_operations + self.backward_operations

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
    layer_map: Literal["uniform", "last"] = "uniform",
    device: Literal["gpu", "cpu"] = "gpu",
) -> Needs:
    """Runs the step of all modules on fake tensors, as it would run on the device.

    Raises ValueError if the two models cannot be paired or the losses refuse their heads.
    """
    pictures = 2 if task == "nlvr2" else 1
    heads: dict[str, HeadSpec] = {task: HeadSpec(classes, pictures)} if classes else {}
    with FakeTensorMode(), _Memory() as memory:
        teacher = CoCa(teacher_config, heads).eval().requires_grad_(False)
        student = CoCa(student_config, heads).train()
        pairs = module_pairs(student, teacher, layer_map)
        objective = Objective(pairs, engine.objective)
        trained = [*student.parameters(), *objective.parameters()]
        optimiser, _ = make_optimiser(trained, dataclasses.replace(engine.optimiser, implementation="adamw"), 1)
        weights = memory.live
        average = [parameter.clone() for parameter in student.parameters()] if engine.ema else []
        averaged = memory.live - weights

        size = student_config.image_encoder.image_size

        def load(items: int) -> TaskBatch:
            return TaskBatch(
                torch.empty(items, pictures, 3, size, size),
                torch.ones(items, text_length, dtype=torch.int64),
                torch.zeros(items, dtype=torch.int64),
            )

        taps, wanted_of_teacher = objective.wanted([pair.name for pair in pairs])
        gates = {pair.name: torch.ones(()) for pair in pairs}
        show, teach = TaskForward(student, task), TaskForward(teacher, task)
        probe = load(probe_size)
        with torch.no_grad(), _running(engine, device):
            probed = teach(probe, wanted_of_teacher)
        probe_bytes = memory.live - weights - averaged
        with torch.no_grad(), _running(engine, device), _losses(device):
            objective(show(probe, taps), probed, gates)

        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        before = memory.live
        optimiser.step()
        states = memory.live - before
        optimiser.zero_grad(set_to_none=True)

        counts = dict.fromkeys(("teacher", "student", "backward"), 0)
        loss_operations = activations = 0
        for _ in range(min(engine.accumulate, 2)):
            start = memory.live
            batch = load(batch_size)
            with _running(engine, device):
                with torch.no_grad(), _counting_operations(counts, "teacher"):
                    taught = teach(batch, wanted_of_teacher)
                with _counting_operations(counts, "student"):
                    shown = show(batch, taps)
                with _losses(device):
                    terms = objective(shown, taught, gates)
            loss_operations += _loss_operations(shown, taught, objective, list(gates))
            total = objective.total(terms) / engine.accumulate
            del taught, shown, terms
            activations = memory.live - start
            with _counting_operations(counts, "backward"):
                total.backward()  # type: ignore[no-untyped-call]
            del total, batch
        clip_gradients(trained, engine.optimiser.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        del average

    times = engine.accumulate / min(engine.accumulate, 2)
    return Needs(
        teacher_parameters=_parameters(teacher),
        student_parameters=_parameters(student),
        projection_parameters=_parameters(objective),
        weights=weights,
        gradients=gradients,
        optimiser=states,
        average=averaged,
        probe=probe_bytes,
        activations=activations,
        peak=memory.peak,
        teacher_operations=times * counts["teacher"],
        student_operations=times * counts["student"],
        loss_operations=times * loss_operations,
        backward_operations=times * counts["backward"],
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextlib.contextmanager
def _running(engine: DistillerConfig, device: Literal["gpu", "cpu"]) -> Iterator[None]:
    """The arithmetic of the engine. On a GPU bf16 leaves attention fused, which on a CPU it does not."""
    if device == "cpu" or engine.precision == "fp32":
        with arithmetic(engine.precision, torch.device("cpu")):
            yield
    else:
        with torch.autocast("cpu", torch.bfloat16 if engine.precision == "bf16" else torch.float16):
            yield


@contextlib.contextmanager
def _losses(device: Literal["gpu", "cpu"]) -> Iterator[None]:
    """On a GPU each loss is one operator, as it also is in a compiled graph, rather than the many calls over tiles."""
    if device == "cpu":
        yield
    else:
        with patch.object(torch.compiler, "is_compiling", lambda: True):
            yield


@contextlib.contextmanager
def _counting_operations(counts: dict[str, int], name: str) -> Iterator[None]:
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
    counts[name] += counter.get_total_flops()


def _loss_operations(student: Forward, teacher: Forward, objective: Objective, modules: list[str]) -> int:
    """The matrix products in the losses' definitions and in their gradients, each once."""
    config, found = objective.config, 0
    for module in modules:
        layers = objective.pairs[module].teacher_layer_of()
        tapped = dict(zip(sorted(set(layers)), teacher.taps[module], strict=True))
        for i, tap in enumerate(student.taps[module]):
            if config.hidden:
                found += 6 * tap.hidden.numel() * tapped[layers[i]].hidden.shape[-1]
            if config.attention:
                for s, t in zip(tap.attention, tapped[layers[i]].attention, strict=True):
                    found += 2 * (3 * s.q.numel() * s.k.shape[2] + t.q.numel() * t.k.shape[2])
    if config.logits and isinstance(student.prediction, LinearPrediction):
        assert isinstance(teacher.prediction, LinearPrediction)
        ours, theirs = student.prediction.hidden, teacher.prediction.hidden
        found += 2 * len(student.prediction.weight) * (3 * ours.numel() + theirs.numel())
    return found


def predicted_seconds(needs: Needs, gpu: Gpu, config: PlanConfig) -> float:
    """A prediction: the operations at the assumed share of the peak, then AdamW at four fifths of the bandwidth.

    AdamW reads weight, gradient and two moments and writes all but the gradient, four bytes each.
    """
    rate = (gpu.fp32 if config.engine.precision == "fp32" else gpu.bf16) * 1e12 * config.utilisation
    trained = needs.student_parameters + needs.projection_parameters
    return needs.operations / rate + 28 * trained / (0.8 * gpu.bandwidth * 1e12)


def largest_batch(needs: Needs, batch_size: int, memory: float) -> int:
    """About the most items a batch that fit `memory` (GB): what is not resident is taken to grow with the batch."""
    fixed = needs.resident + needs.gradients
    each = max(1, needs.peak - needs.resident) / batch_size
    return max(0, int((memory * 1e9 / HEADROOM - fixed) / each))


def plan(config: PlanConfig) -> None:
    """Prints what the distillation needs."""
    teacher = _sizes(config.teacher, None)
    student = _sizes(config.student, teacher)
    needs = _needs(config, teacher, student)
    advice = _advice(config, teacher, student, needs)
    if config.json:
        print(json.dumps(_figures(config, needs, advice), indent=1))
    else:
        _show(config, needs, advice)


def _sizes(name: str, teacher: CoCaConfig | None) -> CoCaConfig:
    return load_coca(Path(name)).config if name.endswith(".safetensors") else preset(name, teacher)


def _needs(config: PlanConfig, teacher: CoCaConfig, student: CoCaConfig) -> Needs:
    longest = min(teacher.text_decoder.context_length, student.text_decoder.context_length)
    if config.text_length > longest:
        raise ValueError(f"text_length must be at most {longest}, which both models read, got {config.text_length}")
    return measure_needs(
        teacher,
        student,
        config.task,
        batch_size=config.batch_size,
        probe_size=config.probe_size,
        text_length=config.text_length or longest,
        classes=config.classes or CLASSES[config.task],
        engine=config.engine,
        layer_map=config.layer_map,
    )


def _advice(config: PlanConfig, teacher: CoCaConfig, student: CoCaConfig, needs: Needs) -> list[str]:
    """What to change if the step does not fit, the least harmful first; empty if it fits."""
    if needs.peak * HEADROOM <= config.memory * 1e9:
        return []
    advice = []
    if config.engine.precision == "fp32":
        leaner = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="bf16"))
        needs = _needs(leaner, teacher, student)
        advice.append(f"--engine.precision bf16: peak {needs.peak / GIB:.1f} GiB")
    batch = largest_batch(needs, config.batch_size, config.memory)
    if 0 < batch < config.batch_size:
        parts = math.ceil(config.batch_size / batch)
        options = f"--batch_size {config.batch_size // parts} --engine.accumulate {parts * config.engine.accumulate}"
        advice.append(f"{options}: the step in parts (at most about {batch} items fit)")
    if config.probe_size > 16:
        each = needs.probe / config.probe_size
        advice.append(f"--probe_size 16: {each * (config.probe_size - 16) / GIB:.1f} GiB less, and noisier rewards")
    if not batch:
        advice.append("nothing else helps here: a smaller student or teacher, or a GPU with more memory")
    return advice


def _figures(config: PlanConfig, needs: Needs, advice: list[str]) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "needs": dataclasses.asdict(needs),
        "fits": needs.peak * HEADROOM <= config.memory * 1e9,
        "headroom": HEADROOM,
        "advice": advice,
        "predicted": {
            gpu.name: {
                "seconds": predicted_seconds(needs, gpu, config),
                "largest_batch": largest_batch(needs, config.batch_size, gpu.memory),
            }
            for gpu in GPUS
        },
    }


def _show(config: PlanConfig, needs: Needs, advice: list[str]) -> None:
    console = Console()
    engine = config.engine
    title = (
        f"{config.teacher} -> {config.student}, {config.task}, batch {config.batch_size}"
        f"{f' x {engine.accumulate}' if engine.accumulate > 1 else ''}, {engine.precision}"
    )
    memory = Table(title=title, title_justify="left", header_style="bold")
    memory.add_column("memory of a step, all modules tapped")
    memory.add_column("GiB", justify="right")
    memory.add_column("")
    rows = (
        ("weights", needs.weights, f"teacher {needs.teacher_parameters / 1e6:.1f} M, student "
         f"{needs.student_parameters / 1e6:.1f} M, projections {needs.projection_parameters / 1e6:.1f} M"),
        ("gradients", needs.gradients, "student and projections"),
        ("optimiser", needs.optimiser, "AdamW's two moments"),
        ("running average", needs.average, ""),
        ("held probe batch", needs.probe, f"{config.probe_size} items, as the teacher shows them"),
        ("activations", needs.activations, f"{needs.activations / config.batch_size / 2**20:.0f} MiB an item"),
    )  # fmt: skip
    for name, size, remark in rows:
        if size:
            memory.add_row(name, f"{size / GIB:.2f}", remark)
    memory.add_row("peak", f"[bold]{needs.peak / GIB:.2f}[/bold]", "the most alive at once")
    console.print(memory)

    work = Table(header_style="bold")
    for heading in ("10^12 operations a step", "teacher", "student", "losses", "backward", "all"):
        work.add_column(heading, justify="left" if heading.startswith("10") else "right")
    parts = (
        needs.teacher_operations,
        needs.student_operations,
        needs.loss_operations,
        needs.backward_operations,
        needs.operations,
    )
    work.add_row("", *(f"{part / 1e12:.2f}" for part in parts))
    console.print(work)

    speed = Table(title="Predictions, not measurements", title_justify="left", header_style="bold")
    for heading in ("GPU", "ms a step", "items a second", "largest batch, about"):
        speed.add_column(heading, justify="left" if heading == "GPU" else "right")
    for gpu in GPUS:
        seconds = predicted_seconds(needs, gpu, config)
        items = config.batch_size * engine.accumulate / seconds
        speed.add_row(
            gpu.name, f"{1000 * seconds:.0f}", f"{items:.0f}", str(largest_batch(needs, config.batch_size, gpu.memory))
        )
    console.print(speed)
    peak = "fp32" if engine.precision == "fp32" else "dense 16-bit"
    console.print(
        f"Assumed: {100 * config.utilisation:.0f} % of the makers' {peak} peak, 80 % of the bandwidth in the "
        f"optimiser, {100 * (HEADROOM - 1):.0f} % more memory than the tensors take.",
        highlight=False,
    )
    if advice:
        console.print(f"Does not fit {config.memory:g} GB. What to change:", style="bold", highlight=False)
        for line in advice:
            console.print(f"  {line}", highlight=False, soft_wrap=True)
    else:
        console.print(f"Fits {config.memory:g} GB.", style="bold", highlight=False)
