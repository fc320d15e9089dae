"""`attention_map_losses` beside eager torch, compiled eager torch and, for plain maps, TextBrewer.

Maps are plain, causal, of grouped key heads (four query heads read one), or means over heads of a teacher with four
more heads. Every contender gets q and k, makes its own products and softmax, forward and backward, and must give our
gradients of q and k. TextBrewer's cross entropy differs from KL by a constant, so the losses themselves are not
compared. What it is handed is scores for "kl" and maps for "mse", as its users do.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.contest import Contest, Sweep, Work
from bench.harness.losses import Loss, LossContest, by_layer, draws, dtype_of
from bench.harness.peers import compiled, textbrewer
from optima_kernels import attention_map_losses

KINDS = ("kl", "mse")
VARIANTS = ("plain", "causal", "grouped", "mean")
GROUP = 4  # query heads that read one key head, of "grouped"
Maps = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def contests(device: torch.device) -> list[Contest]:
    if device.type == "cpu":
        cases = [
            (1, 4, 12, 1024, 64, {"time": 0.35, "extra": 1 / 15}),
            (1, 8, 12, 257, 64, {"time": 0.85}),
        ]
        made = [contest(device, kind, *case) for case in cases for kind in KINDS]
        made += [contest(device, "kl", 1, 4, 12, 257, 64, variant=variant) for variant in VARIANTS[1:]]
        return [*made, *(contest(device, kind, 1, 4, 12, 2048, 64, {"extra": 1 / 30}, peers=False) for kind in KINDS)]
    shapes = [(6, 8, 12, 577, 64), *((1, 8, 12, n, 64) for n in (197, 1024, 2048, 4096)), (6, 8, 8, 577, 128)]
    made = [contest(device, kind, *shape) for shape in shapes for kind in KINDS]
    large = [(6, 16, 12, 577, 64), (1, 8, 16, 1024, 128)]
    return made + [contest(device, "kl", *shape, variant=variant) for shape in large for variant in VARIANTS[1:]]


def sweeps(device: torch.device) -> list[Sweep]:
    large = device.type != "cpu"
    tokens = (512, 1024, 2048, 4096, 8192) if large else (256, 512, 1024, 2048, 4096)
    make = partial(contest, device, "kl", peers=False)
    return [
        Sweep(
            "attention",
            "kl, B 1, H 12, d 64",
            "N",
            tokens,
            lambda n: make(1, 1, 12, n, 64),
            most={"eager": 2048 if not large else 8192},
        ),
        Sweep("attention", "kl, H 12, N 577, d 64", "batch", (1, 2, 4, 8), lambda b: make(1, b, 12, 577, 64)),
        Sweep("attention", "kl, B 1, H 12, N 577, d 64", "layers", (1, 2, 4, 8), lambda n: make(n, 1, 12, 577, 64)),
    ]


def contest(
    device: torch.device,
    kind: str,
    layers: int,
    batch: int,
    heads: int,
    tokens: int,
    width: int,
    bars: dict[str, float] | None = None,
    peers: bool = True,
    variant: str = "plain",
) -> Contest:
    """Maps of `layers` layers; float32 on a CPU, else bfloat16."""
    dtype = dtype_of(device)

    @cache
    def tensors() -> list[list[Tensor]]:
        """Queries and keys of student and teacher, each with an entry a layer."""
        normal = draws(device, dtype)
        heads_t = heads + 4 * (variant == "mean")
        keys_of = GROUP if variant == "grouped" else 1
        counts = (heads, heads // keys_of, heads_t, heads_t // keys_of)
        made = [[normal(batch, count, tokens, width) for _ in range(layers)] for count in counts]
        return [[x.requires_grad_(i < 2) for x in side] for i, side in enumerate(made)]

    def ours(backend: str | None = None, gate: float | None = None) -> Loss:
        gates = None if gate is None else torch.full((layers,), gate, device=device)
        options: dict[str, Any] = {
            "kind": kind,
            "heads": "mean" if variant == "mean" else "match",
            "causal": variant == "causal",
        }
        return lambda *sides: attention_map_losses(*sides, backend=backend, gate=gates, **options).sum()

    others: dict[str, Callable[[], Loss]] = {}
    if peers:
        others["torch.compile(eager)"] = lambda: by_layer(compiled(eager(kind, variant)))
        if variant == "plain":
            others["TextBrewer"] = lambda: by_layer(with_textbrewer(kind))
    elements = layers * batch * heads * tokens**2 // (2 if variant == "causal" else 1)
    title = kind if variant == "plain" else f"{kind} {variant}"
    moved = 6 * layers * batch * heads * tokens * width * dtype.itemsize
    measured = LossContest(device, tensors, lambda sides: [*sides[0], *sides[1]], bars=bars or {})
    return measured.contest(
        "attention",
        f"{title}, L {layers}, B {batch}, H {heads}, N {tokens}, d {width}",
        lambda: by_layer(eager(kind, variant)),
        ours,
        others,
        # Two products of scores and two of gradients; each element of both maps once.
        work=Work(8.0 * elements * width, 2.0 * elements, moved),
    )


def scores(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    if k.shape[1] < q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    products: Tensor = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if not causal:
        return products
    # Low, but finite: the logarithms of two forbidden elements have a difference.
    return products.masked_fill(~torch.ones_like(products[0, 0], dtype=torch.bool).tril(), -1e4)


def eager(kind: str, variant: str = "plain") -> Maps:
    """The usual way: both maps, and the mean over rows (KL) or over attended elements (MSE)."""

    def loss(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        batch, heads, tokens, _ = q_s.shape
        scores_s, scores_t = (scores(q, k, variant == "causal") for q, k in ((q_s, k_s), (q_t, k_t)))
        if variant == "mean":
            p_s, p_t = (x.softmax(-1).mean(1) for x in (scores_s, scores_t))
            if kind == "mse":
                return F.mse_loss(p_s, p_t)
            return F.kl_div(p_s.log(), p_t, reduction="sum") / (batch * tokens)
        if kind == "mse":
            attended = batch * heads * (tokens * (tokens + 1) // 2 if variant == "causal" else tokens**2)
            return F.mse_loss(scores_s.softmax(-1), scores_t.softmax(-1), reduction="sum") / attended
        rows = batch * heads * tokens
        return F.kl_div(scores_s.log_softmax(-1), scores_t.log_softmax(-1), reduction="sum", log_target=True) / rows

    return loss


def with_textbrewer(kind: str) -> Maps:
    losses = textbrewer()

    def loss(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        scores_s, scores_t = scores(q_s, k_s), scores(q_t, k_t)
        if kind == "mse":
            return losses.att_mse_loss(scores_s.softmax(-1), scores_t.softmax(-1))
        # Without a mask it drops the weight of every negative score, which is meant for masks added to scores.
        return losses.att_ce_loss(scores_s, scores_t, mask=torch.ones(q_s.shape[0], q_s.shape[2], device=q_s.device))

    return loss
