"""`linear_kl` and `prediction_kl` beside eager torch, the same compiled, Liger, TextBrewer and torchdistill.

Forward and backward, temperature 2. Liger's chunked loss runs in chunks of 1024 tokens, its default, and compiled on a
GPU, its default there; its Jensen-Shannon loss at beta 0 is the forward divergence, without the factor T^2. "chunks" is
what one writes in twenty lines: the same chunks, torch's own matrix products, the divergence compiled, gradients made
in the forward pass. TextBrewer's cross entropy differs from KL by a constant, so gradients are compared and losses are
not.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.contest import Bar, Contest, Run, Sweep, Work
from bench.harness.losses import Loss, LossContest, draws, dtype_of
from bench.harness.peers import compiled, liger, textbrewer, torchdistill
from optima_kernels import linear_kl, prediction_kl

TEMPERATURE = 2.0
CHUNK_TOKENS = 1024
NO_SLOWER = Bar("optima", "torch.compile(eager)", "time", 1.0)


def contests(device: torch.device) -> list[Contest]:
    if device.type == "cpu":
        return [
            linear(device, "forward", 2048, 49408, 512, 768, (NO_SLOWER, Bar("optima", "eager", "extra", 0.1))),
            predictions(device, 256, 3129),
            predictions(device, 64, 3),
        ]
    sizes = [(2048, 768, 1024, 49408), (4096, 1024, 1024, 50257), (8192, 2048, 4096, 128256), (2048, 768, 1024, 256000)]
    made = [linear(device, "forward", tokens, size, d_s, d_t) for tokens, d_s, d_t, size in sizes]
    return [*made[:1], linear(device, "jsd", 2048, 49408, 768, 1024), *made[1:], predictions(device, 4096, 3129)]


def sweeps(device: torch.device) -> list[Sweep]:
    tokens, sizes = ((512, (8192, 16384, 32768, 65536)), (4096, (32768, 65536, 131072, 262144)))[device.type != "cpu"]
    return [
        Sweep(
            "logits",
            f"{tokens} tokens, 512 and 768",
            "V",
            sizes,
            lambda size: linear(device, "forward", tokens, size, 512, 768, peers=False),
        ),
        Sweep(
            "logits",
            "V 32768, 512 and 768",
            "N",
            (256, 512, 1024, 2048),
            lambda n: linear(device, "forward", n, 32768, 512, 768, peers=False),
        ),
    ]


def linear(
    device: torch.device,
    divergence: str,
    tokens: int,
    size: int,
    d_s: int,
    d_t: int,
    bars: tuple[Bar, ...] = (),
    peers: bool = True,
) -> Contest:
    """From states and heads."""
    dtype = dtype_of(device)

    @cache
    def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        normal = draws(device, dtype)
        h_s, w_s = normal(tokens, d_s), normal(size, d_s, std=d_s**-0.5)
        return h_s.requires_grad_(), w_s.requires_grad_(), normal(tokens, d_t), normal(size, d_t, std=d_t**-0.5)

    def of_logits(compare: Loss) -> Loss:
        def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
            with torch.no_grad():
                z_t = h_t @ w_t.t()
            return compare(h_s @ w_s.t(), z_t)

        return loss

    def of_liger() -> Loss:
        loss = liger().LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=0.0,
            temperature=TEMPERATURE,
            compiled=device.type != "cpu",
        )
        labels = torch.zeros(tokens, dtype=torch.int64, device=device)
        return lambda *heads: loss(*heads, labels) * TEMPERATURE**2

    def of_chunks() -> Run:
        parts = compiled(forward_parts)

        def run() -> Sequence[Tensor]:
            with torch.no_grad():
                h_s, w_s, h_t, w_t = tensors()
                of_state, of_head = torch.empty_like(h_s), torch.zeros_like(w_s)
                for start in range(0, tokens, CHUNK_TOKENS):
                    chunk = slice(start, start + CHUNK_TOKENS)
                    _, gradient = parts(h_s[chunk] @ w_s.t(), h_t[chunk] @ w_t.t())
                    gradient *= TEMPERATURE / tokens
                    torch.mm(gradient, w_s, out=of_state[chunk])
                    of_head.addmm_(gradient.t(), h_s[chunk])
                return of_state, of_head

        return run

    def ours(backend: str | None = None, gate: float | None = None) -> Loss:
        gates = None if gate is None else torch.tensor(gate, device=device)
        options: dict[str, Any] = {"temperature": TEMPERATURE, "divergence": divergence, "backend": backend}
        return lambda *heads: linear_kl(*heads, gate=gates, **options)

    others: dict[str, Callable[[], Loss]] = {}
    if peers and divergence == "forward":
        others["torch.compile(eager)"] = lambda: compiled(of_logits(eager("forward")))
        others["Liger"] = of_liger
        others["TextBrewer"] = lambda: of_logits(with_textbrewer())
        others["torchdistill"] = lambda: of_logits(with_torchdistill())
    moved = dtype.itemsize * (2 * (tokens + size) * d_s + (tokens + size) * d_t)
    return LossContest(device, tensors, lambda heads: heads[:2]).contest(
        "logits",
        f"linear {divergence}, {tokens} tokens, V {size}, {d_s} and {d_t}",
        lambda: of_logits(eager(divergence)),
        ours,
        others,
        runs={"chunks": of_chunks} if "Liger" in others else {},
        bars=bars,
        work=Work(2.0 * tokens * size * (3 * d_s + d_t), 2.0 * tokens * size, moved),
        rounds=3,
    )


def predictions(device: torch.device, rows: int, size: int) -> Contest:
    """From logits, as for an answer set."""

    @cache
    def tensors() -> tuple[Tensor, Tensor]:
        normal = draws(device, torch.float32)
        return normal(rows, size).requires_grad_(), normal(rows, size)

    def ours(backend: str | None = None, gate: float | None = None) -> Loss:
        return lambda z_s, z_t: prediction_kl(z_s, z_t, temperature=TEMPERATURE)

    return LossContest(device, tensors, lambda logits: logits[:1]).contest(
        "logits",
        f"predictions, {rows} rows, V {size}",
        lambda: eager("forward"),
        ours,
        {
            "torch.compile(eager)": lambda: compiled(eager("forward")),
            "TextBrewer": with_textbrewer,
            "torchdistill": with_torchdistill,
        },
        bars=(NO_SLOWER,),
        variants=False,
    )


def eager(divergence: str) -> Loss:
    def loss(z_s: Tensor, z_t: Tensor) -> Tensor:
        log_s, log_t = ((z / TEMPERATURE).log_softmax(-1) for z in (z_s, z_t))
        if divergence == "jsd":
            middle = (log_s.exp().lerp(log_t.exp(), 0.5)).log()
            halves = (F.kl_div(middle, log, log_target=True, reduction="batchmean") / 2 for log in (log_s, log_t))
            return sum(halves, torch.zeros((), device=z_s.device)) * TEMPERATURE**2
        return F.kl_div(log_s, log_t, log_target=True, reduction="batchmean") * TEMPERATURE**2

    return loss


def forward_parts(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the forward divergence of rows, and its gradient in the student's logits over temperature."""
    log_s, log_t = ((z.float() / TEMPERATURE).log_softmax(-1) for z in (z_s, z_t))
    return (log_t.exp() * (log_t - log_s)).sum(), (log_s.exp() - log_t.exp()).to(z_s.dtype)


def with_textbrewer() -> Loss:
    losses = textbrewer()
    return lambda z_s, z_t: losses.kd_ce_loss(z_s, z_t, TEMPERATURE) * TEMPERATURE**2


def with_torchdistill() -> Loss:
    place = ("head", "output")
    loss = torchdistill().KDLoss(*place, *place, temperature=TEMPERATURE, alpha=0.0)
    return lambda z_s, z_t: loss({"head": {"output": z_s}}, {"head": {"output": z_t}}) * TEMPERATURE**2
