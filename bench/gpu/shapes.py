"""The sizes that kernels are timed at, with what they have to do and what others would take for it.

`flops` are those of the products that the loss and its gradients need at least, `exps` its exponentials (two of a map's
element, two of a logit), `bytes` every input read and every gradient written once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import optima_kernels
from bench.gpu.context import Context
from bench.gpu.draws import takes_grouped_keys
from bench.gpu.timing import Run

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
TEMPERATURE = 2.0
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """A call: `ours` makes the inputs and returns the run; so does each of `peers`."""

    name: str
    ours: Callable[[], Run]
    flops: float
    exps: float
    bytes: float
    peers: dict[str, Callable[[], Run]] = field(default_factory=dict)


def compiled(function: Loss) -> Loss:
    made: Loss = torch.compile(function, dynamic=False)
    return made


def _normal(context: Context, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(context.device).manual_seed(context.seed)
    return lambda *shape, std=1.0: (torch.randn(shape, generator=generator, device=context.device) * std).to(dtype)


def attention(
    context: Context,
    name: str,
    sizes: tuple[int, int, int, int],
    *,
    heads_t: int | None = None,
    key_heads: int | None = None,
    widths: tuple[int, int] | None = None,
    masks: str = "",
    lse: bool = False,
    layers: int = 1,
    peers: bool = False,
    **options: Any,
) -> Shape:
    """Batch, heads, tokens and head width of `layers` equal layers."""
    batch, heads, tokens, width = (1, 2, 40, 16) if context.rehearse else sizes
    heads_t = (2 if context.rehearse else heads_t) or heads
    key_heads = None if context.rehearse else key_heads
    width_s, width_t = (width, width) if context.rehearse or widths is None else widths

    @cache
    def inputs() -> tuple[dict[str, Any], dict[str, Any]]:
        normal = _normal(context, BFLOAT16)

        def side(heads: int, width: int, trained: bool) -> list[Tensor]:
            shape = (batch, tokens, heads, width)
            return [normal(*shape).transpose(1, 2).requires_grad_(trained) for _ in range(layers)]

        tensors = {"q_s": side(heads, width_s, True), "k_s": side(key_heads or heads, width_s, True)}
        tensors |= {"q_t": side(heads_t, width_t, False), "k_t": side(key_heads or heads_t, width_t, False)}
        rest: dict[str, Any] = dict(options)
        if masks == "lengths":
            rest["key_lengths"] = torch.randint(tokens // 2, tokens + 1, (batch,), device=context.device)
        if masks == "keys":
            rest["mask"] = torch.rand(batch, 1, 1, tokens, device=context.device) < 0.8
        if masks == "bool":
            rest["mask"] = torch.rand(batch, 1, tokens, tokens, device=context.device) < 0.8
        if lse:
            for name in "st":
                pairs = zip(tensors[f"q_{name}"], tensors[f"k_{name}"], strict=True)
                scores = [(q.detach() @ k.detach().mT).float() * q.shape[-1] ** -0.5 for q, k in pairs]
                rest[f"lse_{name}"] = [x.logsumexp(-1) for x in scores]
        return tensors, rest

    def gradients(loss: Callable[[], Tensor]) -> Run:
        leaves = [*inputs()[0]["q_s"], *inputs()[0]["k_s"]]
        return lambda: torch.autograd.grad(loss(), leaves)

    def ours() -> Run:
        tensors, rest = inputs()
        return gradients(lambda: optima_kernels.attention_map_losses(**tensors, **rest, backend="triton").sum())

    def eager(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        z_s, z_t = ((q @ k.mT).float() * q.shape[-1] ** -0.5 for q, k in ((q_s, k_s), (q_t, k_t)))
        if options.get("causal"):
            hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=context.device).triu(1)
            z_s, z_t = (z.masked_fill(hidden, -torch.inf) for z in (z_s, z_t))
        if options.get("kind") == "mse":
            return F.mse_loss(z_s.softmax(-1), z_t.softmax(-1))
        target, log_s = z_t.softmax(-1), z_s.log_softmax(-1)
        if options.get("heads") == "mean":
            return F.kl_div(log_s.exp().mean(1).log(), target.mean(1), reduction="sum") / (batch * tokens)
        if options.get("causal"):
            log_s = log_s.masked_fill(hidden, 0.0)
        return F.kl_div(log_s, target, reduction="sum") / (batch * heads * tokens)

    def of(function: Loss) -> Callable[[], Run]:
        def make() -> Run:
            sides = [inputs()[0][name] for name in ("q_s", "k_s", "q_t", "k_t")]
            return gradients(lambda: torch.stack([function(*layer) for layer in zip(*sides, strict=True)]).sum())

        return make

    elements = layers * batch * heads * tokens * tokens * (0.5 if options.get("causal") else 1.0)
    moved = 2 * layers * batch * tokens * heads * (4 * width_s + 2 * width_t)
    others = {"eager": of(eager), "compiled": of(compiled(eager))} if peers else {}
    flops = 2 * elements * (3 * width_s + width_t * heads_t / heads)
    return Shape(f"attention {name}", ours, flops, elements * (1 + heads_t / heads), moved, others)


def hidden(
    context: Context,
    name: str,
    tokens: int,
    widths: tuple[int, int],
    *,
    layers: int = 1,
    normalize: str | None = None,
    autocast: bool = False,
    gated: bool = False,
    peers: bool = False,
) -> Shape:
    """States of `layers` equal layers, projected. Under autocast, everything is float32."""
    tokens, (narrow, wide) = (40, (32, 48)) if context.rehearse else (tokens, widths)
    dtype = FLOAT32 if autocast else BFLOAT16

    @cache
    def inputs() -> dict[str, list[Tensor]]:
        normal = _normal(context, dtype)
        made = {"h_s": [normal(tokens, narrow).requires_grad_() for _ in range(layers)]}
        made["h_t"] = [normal(tokens, wide) for _ in range(layers)]
        made["weight"] = [normal(wide, narrow, std=narrow**-0.5).requires_grad_() for _ in range(layers)]
        made["bias"] = [normal(wide).requires_grad_() for _ in range(layers)]
        return made

    def gradients(loss: Callable[[], Tensor]) -> Run:
        leaves = [x for name in ("h_s", "weight", "bias") for x in inputs()[name]]

        def run() -> tuple[Tensor, ...]:
            with torch.autocast(context.device.type, BFLOAT16, enabled=autocast):
                value = loss()
            return torch.autograd.grad(value, leaves)

        return run

    def ours() -> Run:
        gate = torch.ones(layers, device=context.device) if gated else None
        tensors = inputs()
        return gradients(
            lambda: optima_kernels.hidden_mses(**tensors, normalize=normalize, gate=gate, backend="triton").sum()
        )

    def eager(h_s: Tensor, h_t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        projected, target = F.linear(h_s, weight, bias).float(), h_t.float()
        if normalize == "layernorm":
            projected, target = (F.layer_norm(x, (wide,)) for x in (projected, target))
        return F.mse_loss(projected, target)

    def of(function: Loss) -> Callable[[], Run]:
        def make() -> Run:
            sides = list(inputs().values())
            return gradients(lambda: torch.stack([function(*layer) for layer in zip(*sides, strict=True)]).sum())

        return make

    others = {"eager": of(eager), "compiled": of(compiled(eager))} if peers else {}
    moved = dtype.itemsize * layers * (2 * tokens * narrow + tokens * wide + 2 * wide * narrow)
    return Shape(f"hidden {name}", ours, 6.0 * layers * tokens * narrow * wide, 0.0, moved, others)


def linear(
    context: Context,
    name: str,
    tokens: int,
    words: int,
    widths: tuple[int, int],
    *,
    labelled: bool = False,
    autocast: bool = False,
    gated: bool = False,
    peers: tuple[str, ...] = (),
    **options: Any,
) -> Shape:
    """States and heads. Under autocast, everything is float32."""
    if context.rehearse:
        tokens, words, widths = 40, 203, (32, 48)
    dtype = FLOAT32 if autocast else BFLOAT16
    narrow, wide = widths

    @cache
    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        normal = _normal(context, dtype)
        h_s, w_s = normal(tokens, narrow).requires_grad_(), normal(words, narrow, std=narrow**-0.5).requires_grad_()
        return h_s, w_s, normal(tokens, wide), normal(words, wide, std=wide**-0.5)

    def gradients(loss: Callable[[], Any]) -> Run:
        def run() -> tuple[Tensor, ...]:
            with torch.autocast(context.device.type, BFLOAT16, enabled=autocast):
                value = loss()
            total = value[0] + 0.5 * value[1] if isinstance(value, tuple) else value
            return torch.autograd.grad(total, inputs()[:2])

        return run

    def ours() -> Run:
        rest: dict[str, Any] = {"temperature": TEMPERATURE} | options
        if labelled:
            rest["labels"] = torch.randint(0, words, (tokens,), device=context.device)
        if gated:
            rest["gate"] = torch.ones((), device=context.device)
        tensors = inputs()
        return gradients(lambda: optima_kernels.linear_kl(*tensors, **rest, backend="triton"))

    made: dict[str, Callable[[], Run]] = {
        "eager": lambda: gradients(lambda: eager_linear_kl(*inputs())),
        "compiled": lambda: gradients(partial(compiled(eager_linear_kl), *inputs())),
        "vendor chunks": lambda: _vendor_chunks(*inputs()),
        "Liger compiled": lambda: gradients(_liger(context, inputs())),
        "four products": lambda: _products(*inputs()),
    }
    flops = 2.0 * tokens * words * (3 * narrow + wide)
    moved = dtype.itemsize * (2 * (tokens + words) * narrow + (tokens + words) * wide)
    chosen = {peer: made[peer] for peer in peers}
    return Shape(f"linear {name}", ours, flops, 2.0 * tokens * words, moved, chosen)


def eager_linear_kl(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    """The divergence as one writes it in torch, of logits that are stored."""
    with torch.no_grad():
        log_t = ((h_t @ w_t.t()).float() / TEMPERATURE).log_softmax(-1)
    log_s = ((h_s @ w_s.t()).float() / TEMPERATURE).log_softmax(-1)
    return F.kl_div(log_s, log_t, log_target=True, reduction="batchmean") * TEMPERATURE**2


def _vendor_chunks(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, rows: int = 2048) -> Run:
    """Chunks of tokens, torch's own products, and the divergence's gradient compiled: what one would write first."""

    def difference(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
        log_s, log_t = ((z.float() / TEMPERATURE).log_softmax(-1) for z in (z_s, z_t))
        p_t = log_t.exp()
        return (p_t * (log_t - log_s)).sum(), ((log_s.exp() - p_t) * (TEMPERATURE / len(h_s))).to(z_s.dtype)

    function = torch.compile(difference, dynamic=False)

    def run() -> tuple[Tensor, ...]:
        d_w = torch.zeros(w_s.shape, dtype=FLOAT32, device=w_s.device)
        parts = []
        with torch.no_grad():
            for start in range(0, len(h_s), rows):
                chunk = slice(start, start + rows)
                _, d_z = function(h_s[chunk] @ w_s.t(), h_t[chunk] @ w_t.t())
                parts.append(d_z @ w_s)
                d_w += d_z.t() @ h_s[chunk]
            return torch.cat(parts), d_w.to(w_s.dtype)

    return run


def _products(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Run:
    """The vendor's four products alone: what no implementation of stored logits can be faster than."""
    z_s, z_t = (torch.empty(len(h), len(w), dtype=h.dtype, device=h.device) for h, w in ((h_s, w_s), (h_t, w_t)))
    d_h, d_w = torch.empty_like(h_s), torch.empty_like(w_s)

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            torch.mm(h_s, w_s.t(), out=z_s)
            torch.mm(h_t, w_t.t(), out=z_t)
            torch.mm(z_s, w_s, out=d_h)
            torch.mm(z_s.t(), h_s, out=d_w)
        return d_h, d_w

    return run


def _liger(context: Context, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    from bench.harness.peers import liger

    loss = liger().LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, compiled=True
    )
    labels = torch.zeros(len(tensors[0]), dtype=torch.int64, device=context.device)

    def run() -> Tensor:
        value: Tensor = loss(*tensors, labels) * TEMPERATURE**2
        return value

    return run


def full_chip(context: Context) -> Iterator[Shape]:
    """One of each kind of kernel, at a size that keeps every multiprocessor busy."""
    yield attention(context, "kl", (16, 12, 577, 64))
    yield hidden(context, "layernorm, 6 layers", 16 * 577, (768, 1024), layers=6, normalize="layernorm")
    yield linear(context, "forward", 2048, 49408, (768, 1024))
    yield attention(context, "mse causal", (16, 12, 577, 64), kind="mse", causal=True)
    yield attention(context, "kl bool", (8, 12, 577, 64), masks="bool")
    yield attention(context, "kl d128", (8, 16, 577, 128))
    yield attention(context, "kl mean", (8, 12, 577, 64), heads_t=16, heads="mean")
    yield linear(context, "jsd, labels", 1024, 50257, (768, 1024), divergence="jsd", labelled=True)
    yield hidden(context, "gated", 16 * 577, (768, 1024), gated=True, layers=2)
    yield linear(context, "gated", 1024, 49408, (768, 1024), gated=True)


def linears(context: Context) -> Iterator[Shape]:
    every = ("vendor chunks", "four products", "eager", "compiled", "Liger compiled")
    yield linear(context, "2048 x 49408", 2048, 49408, (768, 1024), peers=every)
    yield linear(context, "2048 x 49408 under autocast", 2048, 49408, (768, 1024), autocast=True)
    yield linear(context, "4096 x 50257", 4096, 50257, (1024, 1024), peers=("vendor chunks", "four products", "eager"))
    yield linear(context, "2048 x 49408 jsd", 2048, 49408, (768, 1024), divergence="jsd")
    yield linear(context, "2048 x 49408 labels", 2048, 49408, (768, 1024), labelled=True)
    yield linear(context, "2048 x 49408 gated", 2048, 49408, (768, 1024), gated=True)


def large_linears(context: Context) -> Iterator[Shape]:
    peers = ("vendor chunks", "four products", "eager")
    yield linear(context, "8192 x 128256", 8192, 128256, (2048, 4096), peers=peers)
    yield linear(context, "2048 x 256000", 2048, 256000, (2048, 3584), peers=peers[:2])


def attentions(context: Context) -> Iterator[Shape]:
    yield attention(context, "kl", (16, 12, 577, 64), peers=True)
    yield attention(context, "kl lse", (16, 12, 577, 64), lse=True)
    yield attention(context, "kl causal", (16, 12, 577, 64), causal=True, peers=True)
    yield attention(context, "kl d128", (16, 16, 577, 128))
    yield attention(context, "kl 12 layers", (16, 12, 577, 64), layers=12)
    relation = {"heads": "relation", "relation_heads": 2 if context.rehearse else 16}
    sizes, widths = (16, 12, 577, 64), (64, 64)
    yield attention(context, "kl relation 12 to 16", sizes, heads_t=16, widths=widths, **relation)
    yield attention(context, "mse", (16, 12, 577, 64), kind="mse")
    yield attention(context, "kl mean 12 to 16", (16, 12, 577, 64), heads_t=16, heads="mean", peers=True)
    yield attention(context, "kl 4096 tokens", (2, 16, 4096, 64), peers=True)


def masked_attentions(context: Context) -> Iterator[Shape]:
    for masks in ("lengths", "keys", "bool"):
        yield attention(context, f"kl {masks}", (16, 12, 577, 64), masks=masks)
    yield attention(context, "kl text causal", (64, 8, 76, 64), causal=True, layers=12)
    yield attention(context, "mse causal", (16, 12, 577, 64), kind="mse", causal=True)
    if takes_grouped_keys():
        yield attention(context, "kl 32 heads on 8, causal", (4, 32, 2048, 128), key_heads=8, causal=True)


def hiddens(context: Context) -> Iterator[Shape]:
    tokens, widths = 16 * 577, (768, 1024)
    yield hidden(context, "layernorm, 6 layers", tokens, widths, layers=6, normalize="layernorm", peers=True)
    yield hidden(context, "plain, 6 layers", tokens, widths, layers=6, peers=True)
    yield hidden(
        context, "layernorm, 12 layers, autocast", tokens, widths, layers=12, normalize="layernorm", autocast=True
    )
    yield hidden(context, "layernorm, 1 layer", tokens, widths, normalize="layernorm", peers=True)
    yield hidden(context, "layernorm, 6 layers, gated", tokens, widths, layers=6, normalize="layernorm", gated=True)
    yield hidden(context, "text, 12 layers", 64 * 76, (512, 768), layers=12, normalize="layernorm")
