"""`linear_kl` and `prediction_kl` beside eager torch, the same compiled, Liger, TextBrewer and torchdistill.

Forward and backward, temperature 2. Liger's chunked loss runs in chunks of 1024 tokens, its default, and compiled on a
GPU, its default there; its Jensen-Shannon loss at beta 0 is the forward divergence, without the factor T^2. "chunks" is
what one writes in twenty lines: the same chunks, torch's own matrix products, the divergence compiled, gradients made
in the forward pass. TextBrewer's cross entropy differs from KL by a constant, so gradients are compared and losses are
not.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import Bar, Contest, Run, Sweep, Work
from bench.peers import compiled, liger, textbrewer, torchdistill
from optima_kernels import linear_kl, prediction_kl

TEMPERATURE = 2.0
CHUNK_TOKENS = 1024
NO_SLOWER = Bar("optima", "torch.compile(eager)", "time", 1.0)
Compare = Callable[[Tensor, Tensor], Tensor]


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
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    @cache
    def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

        h_s, w_s = normal(tokens, d_s), normal(size, d_s, std=d_s**-0.5)
        return h_s.requires_grad_(), w_s.requires_grad_(), normal(tokens, d_t), normal(size, d_t, std=d_t**-0.5)

    def gradients(loss: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(loss, tensors()[:2])

    def of_logits(make: Callable[[], Compare]) -> Callable[[], Run]:
        def prepare() -> Run:
            compare = make()

            def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
                with torch.no_grad():
                    z_t = h_t @ w_t.t()
                return compare(h_s @ w_s.t(), z_t)

            called = compiled(loss) if make is as_compiled else loss
            return lambda: gradients(called(*tensors()))

        return prepare

    def of_liger() -> Run:
        loss = liger().LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=0.0,
            temperature=TEMPERATURE,
            compiled=device.type != "cpu",
        )
        labels = torch.zeros(tokens, dtype=torch.int64, device=device)
        return lambda: gradients(loss(*tensors(), labels) * TEMPERATURE**2)

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

    def ours(backend: str | None = None, gate: float | None = None) -> Run:
        closed = None if gate is None else torch.tensor(gate, device=device)

        def run() -> Sequence[Tensor]:
            loss = linear_kl(*tensors(), temperature=TEMPERATURE, divergence=divergence, backend=backend, gate=closed)
            return gradients(loss)

        return run

    contenders: dict[str, Callable[[], Run]] = {"eager": of_logits(lambda: eager(divergence)), "optima": ours}
    if peers and divergence == "forward":
        contenders["torch.compile(eager)"] = of_logits(as_compiled)
        contenders["chunks"] = of_chunks
        contenders["Liger"] = of_liger
        contenders["TextBrewer"] = of_logits(with_textbrewer)
        contenders["torchdistill"] = of_logits(with_torchdistill)
    if device.type != "cpu":
        contenders["optima, blocked"] = lambda: ours("blocked")
        contenders["optima, gate open"] = lambda: ours(gate=1.0)
        contenders["optima, gate closed"] = lambda: ours(gate=0.0)
    moved = dtype.itemsize * (2 * (tokens + size) * d_s + (tokens + size) * d_t)
    return Contest(
        suite="logits",
        name=f"linear {divergence}, {tokens} tokens, V {size}, {d_s} and {d_t}",
        contenders=contenders,
        unequal=("optima, gate closed",),
        tolerance=1e-4 if device.type == "cpu" else 5e-2,
        rounds=3,
        bars=bars,
        work=Work(2.0 * tokens * size * (3 * d_s + d_t), 2.0 * tokens * size, moved),
    )


def predictions(device: torch.device, rows: int, size: int) -> Contest:
    """From logits, as for an answer set."""

    @cache
    def tensors() -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        z_s, z_t = (torch.randn(rows, size, generator=generator, device=device) for _ in range(2))
        return z_s.requires_grad_(), z_t

    def of(make: Callable[[], Compare]) -> Callable[[], Run]:
        def prepare() -> Run:
            compare = compiled(make()) if make is as_compiled else make()
            return lambda: torch.autograd.grad(compare(*tensors()), tensors()[:1])

        return prepare

    return Contest(
        suite="logits",
        name=f"predictions, {rows} rows, V {size}",
        contenders={
            "eager": of(lambda: eager("forward")),
            "optima": of(lambda: lambda z_s, z_t: prediction_kl(z_s, z_t, temperature=TEMPERATURE)),
            "torch.compile(eager)": of(as_compiled),
            "TextBrewer": of(with_textbrewer),
            "torchdistill": of(with_torchdistill),
        },
        bars=(NO_SLOWER,),
    )


def eager(divergence: str) -> Compare:
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


def as_compiled() -> Compare:
    """Eager's forward divergence; the whole of it is compiled, heads included."""
    return eager("forward")


def with_textbrewer() -> Compare:
    losses = textbrewer()
    return lambda z_s, z_t: losses.kd_ce_loss(z_s, z_t, TEMPERATURE) * TEMPERATURE**2


def with_torchdistill() -> Compare:
    place = ("head", "output")
    loss = torchdistill().KDLoss(*place, *place, temperature=TEMPERATURE, alpha=0.0)
    return lambda z_s, z_t: loss({"head": {"output": z_s}}, {"head": {"output": z_t}}) * TEMPERATURE**2
