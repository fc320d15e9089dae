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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from optima.assets import STUDENT
from optima.assets import TEACHER as TEACHER_FILE
from optima.coca import CoCa, CoCaConfig, HeadSpec
from optima.coca.checkpoint import load_coca
from optima.coca.pairs import module_pairs
from optima.coca.presets import preset
from optima.data.records import FORMATS
from optima.recipes.coca_large import TEACHER, TEACHER_FILES
from optima.runs.config import DistillConfig, told_in_a_line
from optima.tasks import Task
from optima.tasks.batches import TaskBatch
from optima.tasks.fit import refuse_misfit
from optima.tasks.forward import TaskForward
from optima.tasks.pictograms import PictogramTask
from optima_core import DistillerConfig
from optima_core.errors import OptimaError
from optima_core.objective import Forward, LinearPrediction, Objective
from optima_core.optimiser import clip_gradients, make_optimiser
from optima_core.precision import arithmetic
from optima_core.recompute import recompute_activations

GIB = 2**30
FEW = 16
"""Items of a smaller probe batch, as advised where memory is short."""

HEADROOM = 1.1
"""Memory that a step takes on a GPU beside its tensors, as a factor; our assumption."""


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


@dataclass(frozen=True)
class PlanConfig(DistillConfig):
    """A distillation on one GPU: the options, recipes and resolved config.yaml of `distill`, as they are.

    No data set needs to be there, and no weights: `teacher` and `student` may also be names of presets, whose sizes
    count. Of several GPUs give the share of one as batch_size and probe_size. What bears on neither memory nor the
    time of a step has no effect.

    Attributes:
        memory: Memory of the GPU that the step must fit, GB.
        utilisation: Share of a GPU's peak arithmetic that is assumed to be reached, in (0, 1].
        json: Print the figures as JSON instead of tables.
    """

    memory: float = 80.0
    utilisation: float = 0.4
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.memory < math.inf:
            raise ValueError(f"memory must be a finite number of GB above 0, got {self.memory}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation must be in (0, 1], got {self.utilisation}")


@dataclass(frozen=True)
class Needs:
    """What a step needs. Sizes in bytes; parameters and operations (a multiplication and an addition are two) counted.

    weights: both models and the projections. probe: the held batch and what the teacher shows of it. activations: what
    a batch's forward passes and losses leave for the backward pass. probe_peak, step_peak: the most alive at once while
    the held batch is measured, which the batch size does not change, and in a step.
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

    @property
    def operations(self) -> float:
        """Of a whole optimiser step."""
        return self.teacher_operations + self.student_operations + self.loss_operations + self.backward_operations

    @property
    def peak(self) -> int:
        """The most alive at once, from the start on."""
        return max(self.probe_peak, self.step_peak)

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
    pictures = 2 if task == "nlvr2" else 1
    heads: dict[str, HeadSpec] = {task: HeadSpec(classes, pictures)} if classes else {}
    with FakeTensorMode(), _Memory() as memory:
        teacher = CoCa(teacher_config, heads).eval().requires_grad_(False)
        student = CoCa(student_config, heads).train()
        if recompute:
            recompute_activations(student.transformer_layers())
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

        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        before = memory.live
        optimiser.step()
        states = memory.live - before
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad(), _running(engine, device), _losses(device):
            objective(show(probe, taps), probed, gates)
        probe_peak, memory.peak = memory.peak, memory.live

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
        probe_peak=probe_peak,
        step_peak=memory.peak,
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
    """About the most items a batch that fit `memory` (GB): what is not resident is taken to grow with the batch.

    0 if the held probe batch alone does not fit.
    """
    room = memory * 1e9 / HEADROOM
    if needs.probe_peak > room:
        return 0
    each = max(1, needs.step_peak - needs.resident) / batch_size
    return max(0, int((room - needs.resident - needs.gradients) / each))


def plan(config: PlanConfig) -> None:
    """Prints what the distillation needs."""
    teacher, teacher_name = _sizes("teacher", config.teacher, None)
    student, student_name = _sizes("student", config.student, teacher)
    shape = _shape_of_data(config, {teacher_name: teacher, student_name: student})
    with told_in_a_line():
        needs = _needs(config, teacher, student, shape)
    advice = _advice(config, teacher, student, shape, needs)
    if config.json:
        figures = {"teacher": teacher_name, "student": student_name} | _figures(config, needs, advice)
        print(json.dumps(figures, indent=1, default=str))
    else:
        _show(config, f"{teacher_name} -> {student_name}", needs, advice)


def _sizes(
    role: Literal["teacher", "student"], path: Path | None, teacher: CoCaConfig | None
) -> tuple[CoCaConfig, str]:
    """The sizes that a file or preset has, and what to call it.

    A teacher that a shipped recipe still waits for has the sizes of the model that the recipe says to finetune.
    """
    if path is None:
        return load_coca({"teacher": TEACHER_FILE, "student": STUDENT}[role]).config, f"the shipped {role}"
    if path.suffix != ".safetensors":
        return preset(str(path), teacher), str(path)
    if path.exists():
        return load_coca(path).config, str(path)
    if role == "teacher" and str(path) in TEACHER_FILES.values():
        return preset(TEACHER), f"{TEACHER} (to become {path})"
    raise OptimaError(f"{role} {path} is not there yet; say whose sizes it will have, as in --{role} {TEACHER}")


class _Shape(NamedTuple):
    """Tokens in a row of text, and classes of the task's head."""

    text_length: int
    classes: int


def _shape_of_data(config: PlanConfig, models: dict[str, CoCaConfig]) -> _Shape:
    """What `distill` would find in the data; the official ones need not be there."""
    if config.data.name == "pictograms":
        pictograms = PictogramTask(config.task)
        for name, sizes in models.items():
            with torch.device("meta"):
                refuse_misfit(CoCa(sizes), name, pictograms)
        return _Shape(pictograms.text_length, len(pictograms.classes))
    served = FORMATS[config.data.name].task
    if served != config.task:
        raise OptimaError(f"data {config.data.name} serves task {served}, not {config.task}; give --task {served}")
    lengths = [sizes.text_decoder.context_length for sizes in models.values()]
    text_length = config.data.text_length or lengths[0]
    if text_length > min(lengths):
        raise OptimaError(f"data.text_length must be at most {min(lengths)}, which both models read, got {text_length}")
    classes = {"captioning": 0, "vqa": config.data.answers, "nlvr2": 2, "snli_ve": 3}
    return _Shape(text_length, classes[config.task])


def _needs(config: PlanConfig, teacher: CoCaConfig, student: CoCaConfig, shape: _Shape) -> Needs:
    return measure_needs(
        teacher,
        student,
        config.task,
        batch_size=config.batch_size,
        probe_size=config.probe_size,
        text_length=shape.text_length,
        classes=shape.classes,
        engine=config.engine,
        layer_map=config.layer_map,
        recompute=config.recompute,
    )


def _fits(config: PlanConfig, needs: Needs) -> bool:
    return needs.peak * HEADROOM <= config.memory * 1e9


def _advice(config: PlanConfig, teacher: CoCaConfig, student: CoCaConfig, shape: _Shape, needs: Needs) -> list[str]:
    """Ways to make the step fit, what costs least time first; empty if it fits.

    bf16 is presumed in what follows it, and so are fewer probed items where the probe alone does not fit.
    """
    if _fits(config, needs):
        return []
    advice = []

    def changed(**changes: Any) -> tuple[PlanConfig, Needs]:
        found = dataclasses.replace(config, **changes)
        return found, _needs(found, teacher, student, shape)

    if config.engine.precision == "fp32":
        config, needs = changed(engine=dataclasses.replace(config.engine, precision="bf16"))
        advice.append(f"--engine.precision bf16: peak {needs.peak / GIB:.3g} GiB, and faster")
        if _fits(config, needs):
            return advice
    if config.probe_size > FEW:
        fewer, its_needs = changed(probe_size=FEW)
        advice.append(f"--probe_size {FEW}: peak {its_needs.peak / GIB:.3g} GiB, no more time, but noisier rewards")
        if not largest_batch(needs, config.batch_size, config.memory):
            config, needs = fewer, its_needs
            if _fits(config, needs):
                return advice
    parts = _in_parts(config, needs)
    if parts:
        advice.append(f"{parts}: the step in parts, as many operations")
    if not config.recompute:
        again, its_needs = changed(recompute=True)
        smaller = "" if _fits(again, its_needs) else _in_parts(again, its_needs)
        if _fits(again, its_needs) or (smaller and not parts):
            more = its_needs.operations / needs.operations - 1
            peak = "" if smaller else f"peak {its_needs.peak / GIB:.3g} GiB, "
            options = f"--recompute {smaller}".strip()
            advice.append(f"{options}: {peak}{100 * more:.0f} % more operations")
    if not any("accumulate" in line or "recompute" in line for line in advice):
        advice.append("nothing else helps here: a smaller student or teacher, or a GPU with more memory")
    return advice


def _in_parts(config: PlanConfig, needs: Needs) -> str:
    """The options that cut a step's batch into equal parts that fit; empty if there are none."""
    size = config.batch_size
    fitting = [part for part in range(1, min(size, largest_batch(needs, size, config.memory) + 1)) if size % part == 0]
    if not fitting:
        return ""
    return f"--batch_size {fitting[-1]} --engine.accumulate {size // fitting[-1] * config.engine.accumulate}"


def _figures(config: PlanConfig, needs: Needs, advice: list[str]) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "needs": dataclasses.asdict(needs) | {"peak": needs.peak},
        "fits": _fits(config, needs),
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


def _show(config: PlanConfig, models: str, needs: Needs, advice: list[str]) -> None:
    console = Console()
    engine = config.engine
    title = (
        f"{models}, {config.task}, batch {config.batch_size}"
        f"{f' x {engine.accumulate}' if engine.accumulate > 1 else ''}, {engine.precision}"
        f"{', activations recomputed' if config.recompute else ''}"
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
    memory.add_row("peak of the probe", f"{needs.probe_peak / GIB:.2f}", "the most alive at once, whatever the batch")
    memory.add_row("peak of a step", f"{needs.step_peak / GIB:.2f}", "the most alive at once")
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
