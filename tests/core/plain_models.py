"""A small plain torch model with two modules that show their taps, as a user of the engine would write one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optima_core import (
    AttentionTap,
    Distiller,
    DistillerConfig,
    Forward,
    LayerTap,
    LogitPrediction,
    ModulePair,
    OptimiserConfig,
    WantedTaps,
)

Batch = tuple[Tensor, Tensor]
FEATURES, TOKENS, CLASSES = 6, 5, 3


class Layer(nn.Module):
    """One head of attention, then a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, LayerTap]:
        q, k = self.q(x)[:, None], self.k(x)[:, None]
        x = x + F.gelu(self.out(F.scaled_dot_product_attention(q, k, x[:, None])[:, 0]))
        return x, LayerTap(x, (AttentionTap(q, k),))


class TwoModules(nn.Module):
    """Modules "front" and "back" of some layers each, then a classifier."""

    def __init__(self, width: int, front: int, back: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, width)
        self.front = nn.ModuleList(Layer(width) for _ in range(front))
        self.back = nn.ModuleList(Layer(width) for _ in range(back))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, batch: Batch, wanted: WantedTaps) -> Forward:
        x, labels = batch
        x = self.dropout(self.embed(x))
        taps: dict[str, tuple[LayerTap, ...]] = {}
        for name, layers in (("front", self.front), ("back", self.back)):
            found = []
            for i, layer in enumerate(layers):
                x, tap = layer(x)
                if i in wanted.get(name, ()):
                    found.append(tap)
            if name in wanted:
                taps[name] = tuple(found)
        logits = self.head(x.mean(dim=1))
        return Forward(F.cross_entropy(logits, labels), LogitPrediction(logits), taps)


MODULES = (ModulePair("front", 2, 4, 8, 16), ModulePair("back", 1, 2, 8, 16))


def load(step: int) -> Batch:
    """A batch whose class is the largest of the first three feature means: a pure function of the step."""
    x = torch.randn(8, TOKENS, FEATURES, generator=torch.Generator().manual_seed(step))
    return x, x.mean(dim=1)[:, :CLASSES].argmax(dim=-1)


def make_distiller(
    config: DistillerConfig,
    seed: int = 0,
    dropout: float = 0.0,
    load: Callable[[int], Batch] = load,
    teacher_forward: Callable[[Batch, WantedTaps], Forward] | None = None,
) -> Distiller[Batch]:
    """A distiller of fresh models; equal arguments give equal ones."""
    torch.manual_seed(seed)
    teacher, student = TwoModules(16, 4, 2).eval(), TwoModules(8, 2, 1, dropout)
    return Distiller(student, student, teacher_forward or teacher, MODULES, load, load(10**6), config, seed)


QUICK = OptimiserConfig(learning_rate=1e-2, warmup=0.0)
