"""One whole distillation step of a CoCa image tower, beside the same step written the usual way.

Teacher 24 x 1024 (16 heads), student 12 x 768 (12 heads), 384 px in patches of 16: 577 tokens; batch 4. A step is the
teacher's forward pass, the student's forward and backward pass, a hidden and an attention loss on every student layer,
clipping and AdamW. Ours is the step that the engine takes, `optima_core.Step`; what a round adds to its steps (a probe,
the bandit) is not in it. The learning rate is 0, so that every repetition is the same step; AdamW computes as much.

The usual way is what a user of torch writes without this package. Head means: eager attention in both models, since
fused attention returns no maps; forward hooks keep the maps and states of the paired layers. Relations between
regrouped heads, as in MiniLMv2: fused attention, hooks keep q and k, and the maps of 16 relation heads are made for the
loss. In both, the losses are torch's: `kl_div` of maps, `mse_loss` of `layer_norm`s of projected states. The objective
is the same to the last option, and so are weights, data and optimiser. On a CPU CoCa's linear layers take oneDNN's
products where they are faster than torch's own; "usual way, our linear layers" shows how much that makes.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness.contest import Bar, Contest, Run, Sweep
from optima.coca.config import ImageEncoderConfig
from optima.coca.image_encoder import ImageEncoder
from optima.coca.layers import Linear
from optima_core import (
    DistillerConfig,
    Forward,
    ModulePair,
    Objective,
    ObjectiveConfig,
    OptimiserConfig,
    Step,
    WantedTaps,
)
from optima_core.config import Precision
from optima_core.graphs import WARM_UP, CudaRecorder
from optima_core.optimiser import clip_gradients, make_optimiser
from optima_core.precision import arithmetic
from optima_kernels.attention.problem import regroup_heads

MODULE = "image_encoder"
Matching = Literal["mean", "relation"]
AS_IT_IS = OptimiserConfig(learning_rate=0.0)


@dataclass(frozen=True)
class Sizes:
    """Of the two towers: (layers, width, heads), and of their input."""

    teacher: tuple[int, int, int] = (24, 1024, 16)
    student: tuple[int, int, int] = (12, 768, 12)
    image: int = 384
    patch: int = 16
    batch: int = 4
    classes: int = 512
    relation_heads: int = 16


def contests(device: torch.device, sizes: Sizes | None = None) -> list[Contest]:
    """The step with head means, and with relations."""
    sizes = sizes or Sizes(batch=4 if device.type == "cpu" else 16)
    shape = f"{(sizes.image // sizes.patch) ** 2 + 1} tokens, batch {sizes.batch}"
    names: dict[Matching, str] = {"mean": "head means", "relation": f"{sizes.relation_heads} relation heads"}
    return [_contest(device, sizes, heads, f"{name}, {shape}") for heads, name in names.items()]


def sweeps(device: torch.device) -> list[Sweep]:
    return []


def _contest(device: torch.device, sizes: Sizes, heads: Matching, name: str) -> Contest:
    problem = cache(lambda: Problem(device, sizes, heads))
    contenders = {
        "usual way": lambda: problem().usual(),
        "usual way, our linear layers": lambda: problem().usual(our_linear_layers=True),
        "optima": lambda: problem().ours(),
        "no distillation": lambda: problem().undistilled(),
    }
    if device.type == "cuda":
        contenders["optima, CUDA graph"] = lambda: problem().replayed()
    return Contest(
        suite="whole_step",
        name=name,
        contenders=contenders,
        unequal=("no distillation",),
        tolerance=1e-3 if device.type == "cpu" else 5e-2,
        rounds=3,
        bars=(
            Bar("optima", "usual way", "time", 0.60),
            Bar("optima", "usual way", "peak", 0.45),
            Bar("optima", "no distillation", "time", 1.15),
        ),
    )


class Problem:
    """Both towers, the images and the objective: the same weights for every contender."""

    def __init__(self, device: torch.device, sizes: Sizes, heads: Matching) -> None:
        torch.manual_seed(0)
        self.device, self.sizes = device, sizes
        self.teacher = self._tower(sizes.teacher).eval().requires_grad_(False)
        self.student = self._tower(sizes.student)
        self.images = torch.randn(sizes.batch, 3, sizes.image, sizes.image, device=device)
        self.labels = torch.randint(sizes.classes, (sizes.batch,), device=device)
        self.pair = ModulePair(MODULE, sizes.student[0], sizes.teacher[0], sizes.student[1], sizes.teacher[1])
        self.config = ObjectiveConfig(
            hidden=1.0,
            attention=1.0,
            attention_heads=heads,
            relation_heads=sizes.relation_heads if heads == "relation" else None,
        )
        self.objective = Objective([self.pair], self.config).to(device)

    def _tower(self, size: tuple[int, int, int]) -> ImageEncoder:
        layers, width, heads = size
        config = ImageEncoderConfig(self.sizes.image, self.sizes.patch, width, layers, heads)
        return ImageEncoder(config, self.sizes.classes).to(self.device)

    def ours(self, capturable: bool = False) -> Run:
        """The engine's own step."""
        student, engine = (
            self.student,
            DistillerConfig(objective=self.config, optimiser=AS_IT_IS, precision=self.precision),
        )
        step = Step(student, self._shows(student), self._shows(self.teacher), [self.pair], engine)
        step.objective.load_state_dict(self.objective.state_dict())
        projections = step.objective.projections[MODULE]
        for group in step.optimiser.param_groups:
            group["capturable"] = capturable

        def run() -> list[Tensor]:
            total = step.backward(step.losses(self.images, {MODULE: None}))
            gradients = _compared(student, projections)
            step.update({MODULE: None})
            step.advance()
            return [total, *gradients]

        return run

    def replayed(self) -> Run:
        """The same, recorded as the engine records it with cuda_graphs."""
        run, recorder = self.ours(capturable=True), CudaRecorder(self.device)
        for _ in range(WARM_UP):
            recorder.warm(run)
        replay, found = recorder.record(run)

        def again() -> list[Tensor]:
            replay()
            return found

        return again

    def _shows(self, tower: ImageEncoder) -> Callable[[Tensor, WantedTaps], Forward]:
        """The tower as the engine runs it."""

        def forward(images: Tensor, wanted: WantedTaps) -> Forward:
            feature, _, taps = tower(images, wanted[MODULE])
            return Forward(F.cross_entropy(feature, self.labels), None, {MODULE: taps})

        return forward

    def usual(self, our_linear_layers: bool = False) -> Run:
        teacher, student = same_weights(self.teacher), same_weights(self.student)
        if not our_linear_layers:
            teacher, student = with_torchs_linear_layers(teacher), with_torchs_linear_layers(student)
        projections = self.objective.projections[MODULE]
        assert isinstance(projections, nn.ModuleList)
        update = self._updates([*student.parameters(), *projections.parameters()])
        eager = self.config.attention_heads == "mean"
        layers = self.pair.teacher_layer_of()
        teacher_shows, student_shows = watch(teacher, layers, eager), watch(student, range(len(student.blocks)), eager)

        def run() -> list[Tensor]:
            with self._arithmetic():
                with torch.no_grad():
                    teacher(self.images)
                total = F.cross_entropy(student(self.images)[0], self.labels)
                for i, layer in enumerate(layers):
                    h_s, a_s = student_shows.pop(i)
                    h_t, a_t = teacher_shows.pop(layer)
                    hidden = F.mse_loss(
                        F.layer_norm(projections[i](h_s), h_t.shape[-1:]), F.layer_norm(h_t, h_t.shape[-1:])
                    )
                    total = total + (hidden + self._usual_attention_loss(a_s, a_t)) / len(layers)
                    del h_s, a_s, h_t, a_t
            total.backward()
            return update(total, student, projections)

        return run

    def _usual_attention_loss(self, student: Any, teacher: Any) -> Tensor:
        if self.config.attention_heads == "mean":
            log_s, log_t = (maps.mean(1).clamp_min(1e-30).log() for maps in (student, teacher))
        else:
            with torch.no_grad():
                log_t = self._relations(*teacher)
            log_s = self._relations(*student)
        return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()

    def _relations(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = (regroup_heads(x, self.sizes.relation_heads) for x in (q, k))
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).log_softmax(-1)

    def undistilled(self) -> Run:
        """Both forward passes, the student's backward pass and AdamW, without any distillation loss."""
        student = self.student
        update = self._updates(list(student.parameters()))

        def run() -> list[Tensor]:
            with self._arithmetic():
                with torch.no_grad():
                    self.teacher(self.images)
                total = F.cross_entropy(student(self.images)[0], self.labels)
            total.backward()
            return update(total, student, None)

        return run

    @property
    def precision(self) -> Precision:
        return "fp32" if self.device.type == "cpu" else "bf16"

    def _arithmetic(self) -> Any:
        return arithmetic(self.precision, self.device)

    def _updates(self, trained: Sequence[nn.Parameter]) -> Any:
        """Clipping and AdamW; returns the loss and gradients that contenders must agree in."""
        optimiser, _ = make_optimiser(trained, AS_IT_IS, steps=1)

        def update(total: Tensor, student: ImageEncoder, projections: nn.Module | None) -> list[Tensor]:
            clip_gradients(trained, 1.0)
            optimiser.step()
            gradients = _compared(student, projections)
            optimiser.zero_grad(set_to_none=True)
            return [total.detach(), *gradients]

        return update


def _compared(student: ImageEncoder, projections: nn.Module | None) -> list[Tensor | None]:
    """The gradients that contenders must agree in."""
    shown = [student.patch.weight, *(block.attention.qkv.weight for block in student.blocks)]  # type: ignore
    shown += [] if projections is None else list(projections.parameters())
    return [parameter.grad for parameter in shown]


def same_weights(tower: ImageEncoder) -> ImageEncoder:
    """A copy whose modules may be changed, around the same parameters."""
    return deepcopy(tower, {id(parameter): parameter for parameter in tower.parameters()})


def with_torchs_linear_layers(tower: ImageEncoder) -> ImageEncoder:
    """CoCa's own choose the faster of two libraries on a CPU."""
    for module in tower.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return tower


def watch(tower: ImageEncoder, layers: Sequence[int], eager: bool) -> dict[int, tuple[Tensor, Any]]:
    """Hooks that fill the returned table at every forward pass: layer -> (state, maps), or (state, (q, k))."""
    found: dict[int, tuple[Tensor, Any]] = {}
    kept: dict[int, Any] = {}
    for i, block in enumerate(tower.blocks):
        if eager:
            block.attention = EagerAttention(block.attention)
        if i not in layers:
            continue

        def keep_attention(module: nn.Module, inputs: Any, output: Any, i: int = i) -> None:
            kept[i] = output[1].maps if eager else (output[1].q, output[1].k)

        def keep_state(module: nn.Module, inputs: Any, output: Any, i: int = i) -> None:
            found[i] = (output[0], kept.pop(i))

        block.attention.register_forward_hook(keep_attention)
        block.register_forward_hook(keep_state)
    return found


@dataclass
class Maps:
    """What an eager attention returns beside its output."""

    maps: Tensor


class EagerAttention(nn.Module):
    """Self-attention as model code has it for `output_attentions`: softmax of all scores, then the product with v."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = fused.heads, fused.qkv, fused.out

    def forward(self, x_BND: Tensor, **_: Any) -> tuple[Tensor, Maps]:
        batch, tokens, _ = x_BND.shape
        q, k, v = self.qkv(x_BND).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((maps @ v).transpose(1, 2).flatten(2)), Maps(maps)
