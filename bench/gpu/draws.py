"""Random calls of the losses at sizes of several tiles, each from a seed of its own, and what must hold for one."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import optima_kernels
from bench.gpu.context import Context, Wrong
from optima_kernels import reference

# Largest relative RMS error of a loss or gradient.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
# As a float16 training would have; every dtype gets it.
LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class Call:
    """A call of a loss: tensors or lists of them by name, those in `trained` get gradients, and other options.

    `floor`: how large an element's error may be whatever its size, before the loss scale.
    """

    name: str
    loss: str
    tensors: dict[str, Any]
    trained: tuple[str, ...]
    options: dict[str, Any]
    dtype: torch.dtype
    floor: float = 0.0

    def run(self, backend: str) -> dict[str, Tensor]:
        """The losses and the gradients of a weighted sum of them; "reference" runs in float64."""
        module = reference if backend == "reference" else optima_kernels
        named = {} if backend == "reference" else {"backend": backend}
        tensors = {name: _each(x, backend == "reference") for name, x in self.tensors.items()}
        if backend == "reference":
            tensors = {name: x for name, x in tensors.items() if not name.startswith("lse")}
        trained = [y for name in self.trained if name in tensors for y in _listed(tensors[name])]
        for leaf in trained:
            leaf.requires_grad_()
        value = getattr(module, self.loss)(**tensors, **self.options, **named)
        losses = torch.stack(value) if isinstance(value, tuple) else value.reshape(-1)
        weights = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
        gradients = torch.autograd.grad((losses * weights).sum() * LOSS_SCALE, trained)
        names = [f"{name} {i}" for name in self.trained if name in tensors for i in range(len(_listed(tensors[name])))]
        return {"losses": losses.detach()} | dict(zip(names, gradients, strict=True))

    def in_dtype(self, dtype: torch.dtype) -> "Call":
        """The same values in a wider dtype."""
        convert = {name: _converted(x, self.dtype, dtype) for name, x in self.tensors.items()}
        return replace(self, tensors=convert, dtype=dtype)


def _listed(x: Any) -> list[Tensor]:
    return x if isinstance(x, list) else [x]


def _each(x: Any, wide: bool) -> Any:
    if isinstance(x, list):
        return [_each(y, wide) for y in x]
    return x.detach().double() if wide and x.is_floating_point() else x.detach()


def _converted(x: Any, before: torch.dtype, after: torch.dtype) -> Any:
    if isinstance(x, list):
        return [_converted(y, before, after) for y in x]
    return x.to(after) if x.dtype == before else x


def check(call: Call, context: Context, repetitions: int = 2, tolerance: float | None = None) -> dict[str, Any]:
    """The kernels' answer is the reference's, whatever lay in memory, and the same bits again.

    Raises Wrong.
    """
    exact = call.run("reference")
    poison(context)
    actual = call.run("triton")
    context.finish()
    tolerance = tolerance or TOLERANCES[call.dtype]
    worst, where = 0.0, ""
    for name, expected in exact.items():
        error = relative(actual[name], expected, call.floor * LOSS_SCALE / tolerance)
        if not error <= worst:
            worst, where = error, name
    if not worst <= tolerance:
        raise Wrong(f"relative error of {where} is {worst:.2e}: {call.name}")
    for i in range(repetitions):
        if i % 2:
            poison(context)
        again = call.run("triton")
        if not all(torch.equal(actual[name], again[name]) for name in actual):
            raise Wrong(f"other bits at repetition {i + 1}: {call.name}")
    return {"error": worst, "call": call.name}


def relative(actual: Tensor, expected: Tensor, least: float) -> float:
    """RMS of the difference over that of what was expected, which counts as `least` at least; infinite for NaN."""
    difference = float((actual.double() - expected).square().mean().sqrt())
    size = float(expected.square().mean().sqrt())
    error = difference / max(size, least, 1e-30)
    return error if error == error else float("inf")


def poison(context: Context) -> None:
    """What is allocated next holds NaN: an element that no kernel writes shows."""
    if context.device.type != "cuda":
        return
    filled = [torch.full((2**power,), torch.nan, device=context.device) for power in range(8, 27) for _ in range(2)]
    del filled


def draw(loss: str, index: int, context: Context, dtype: torch.dtype | None = None) -> Call:
    """The problem of that number: the same for the same seed."""
    rng = random.Random(f"{context.seed} {loss} {index}")
    torch.manual_seed(rng.randrange(2**31))
    dtype = dtype or rng.choice([torch.bfloat16, torch.bfloat16, torch.float32, torch.float16])
    return {"attention": _attention, "hidden": _hidden, "linear": _linear}[loss](rng, context, dtype)


def _normal(context: Context, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape, std=1.0: (torch.randn(*shape, device=context.device) * std).to(dtype)


@cache
def takes_grouped_keys() -> bool:
    """Whether keys may have fewer heads than queries."""
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    try:
        optima_kernels.attention_map_loss(q, k, q, k, backend="blocked")
    except ValueError:
        return False
    return True


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    lambda x: x[:1].expand_as(x),
)


def _attention(rng: random.Random, context: Context, dtype: torch.dtype) -> Call:
    most = 40 if context.rehearse else rng.choice([80, 300, 700])
    normal = _normal(context, dtype)
    layers, batch, heads = rng.choice([1, 1, 2, 3]), rng.randint(1, 3), rng.randint(1, 4)
    queries, keys = rng.randint(1, most), rng.randint(1, most)
    widths = [rng.choice([32, 64, 64, 80, 96, 128]) for _ in range(2)]
    kind, causal = rng.choice(["kl", "kl", "mse"]), rng.random() < 0.25
    options: dict[str, Any] = {"kind": kind, "causal": causal}
    matching = rng.choice(["match", "match", "match", "match", "mean", "relation"])
    heads_t, groups, maps = heads, 1, heads
    if matching == "mean":
        options["heads"], heads_t, maps = "mean", rng.randint(1, 4), 1
    elif matching == "relation":
        options |= {"heads": "relation", "relation_heads": 2}
        heads, heads_t, maps = 2 * rng.randint(1, 2), 2 * rng.randint(1, 2), 2
    elif takes_grouped_keys() and heads % 2 == 0 and rng.random() < 0.4:
        groups = 2
    if rng.random() < 0.3:
        options["scale_s"] = 0.2
    layout = rng.choice(LAYOUTS)

    def side(heads: int, width: int, tokens: int) -> list[Tensor]:
        return [layout(normal(batch, heads, tokens, width)) for _ in range(layers)]

    tensors: dict[str, Any] = {"q_s": side(heads, widths[0], queries), "k_s": side(heads // groups, widths[0], keys)}
    tensors |= {"q_t": side(heads_t, widths[1], queries), "k_t": side(heads_t // groups, widths[1], keys)}
    masks = _masks(rng, context, (batch, maps, queries, keys))
    if not masks and not causal and matching == "match" and groups == 1 and rng.random() < 0.4:
        for name in "st":
            scale = options.get("scale_s") if name == "s" else None
            pairs = zip(tensors[f"q_{name}"], tensors[f"k_{name}"], strict=True)
            tensors[f"lse_{name}"] = [_lse(q, k, scale) for q, k in pairs]
    if rng.random() < 0.3:
        tensors["gate"] = torch.tensor([rng.choice([1.0, 0.5, 0.0]) for _ in range(layers)], device=context.device)
    if rng.random() < 0.3:
        tensors["sample_weight"] = torch.rand(batch, device=context.device)
    words = [f"{layers} x {batch}x{heads}/{heads // groups}, {heads_t} of {queries}x{keys}", f"d {widths}", str(dtype)]
    words += [str(options), *masks, *(name for name in ("lse_s", "gate", "sample_weight") if name in tensors)]
    rows = batch * maps * queries * (1 if kind == "kl" else keys)
    tensors |= masks
    plain = kind == "kl" and matching == "match" and "lse_s" not in tensors and dtype != torch.float32
    if plain and rng.random() < 0.3:
        slopes = rng.choice([(1, 0), (0, 1), (1, 1), (1, -1)])
        words.append(f"slopes {slopes}")
        for name, slope in zip("st", slopes, strict=True):
            pairs = zip(tensors[f"q_{name}"], tensors[f"k_{name}"], strict=True)
            tensors[f"q_{name}"], tensors[f"k_{name}"] = map(
                list, zip(*(_steep(*x, slope) for x in pairs), strict=True)
            )
    return Call(", ".join(words), "attention_map_losses", tensors, ("q_s", "k_s"), options, dtype, 3e-6 / rows)


def _steep(q: Tensor, k: Tensor, slope: int) -> tuple[Tensor, Tensor]:
    """Scores that grow along the keys by 64 and more, so that sums over the first are nothing beside the last."""
    q, k = q.clone(), k.clone()
    q[..., 0] = q.shape[-1] ** 0.5
    k[..., 0] += slope * torch.linspace(0, 64, k.shape[2], device=k.device)
    return q, k


def _lse(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    scores = q.double() @ k.double().transpose(2, 3)
    return (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).logsumexp(-1).float()


def _masks(rng: random.Random, context: Context, shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    batch, _, queries, keys = shape
    device, masks = context.device, {}
    kind = rng.choice(["none", "none", "none", "full", "keys", "additive", "lengths", "lengths and full"])
    if "full" in kind:
        masks["mask"] = torch.rand(shape, device=device) < 0.7
    if kind == "keys":
        masks["mask"] = torch.rand(batch, 1, 1, keys, device=device) < 0.7
    if kind == "additive":
        bias = torch.randn(batch, 1, queries, keys, device=device)
        masks["mask"] = bias.masked_fill(torch.rand_like(bias) < 0.3, -torch.inf)
    if "lengths" in kind:
        masks["key_lengths"] = torch.randint(0, keys + 1, (batch,), device=device)
    return masks


def _hidden(rng: random.Random, context: Context, dtype: torch.dtype) -> Call:
    normal, most = _normal(context, dtype), 40 if context.rehearse else rng.choice([90, 700, 3000])
    layers, tokens = rng.choice([1, 1, 2, 4]), rng.randint(1, most)
    widths = [rng.randint(1, 40 if context.rehearse else 1100) for _ in range(2)]
    if rng.random() < 0.6:
        widths = [width // 16 * 16 + 16 for width in widths]
    narrow, wide = widths
    projected = rng.random() < 0.8
    options = {"normalize": rng.choice([None, "layernorm", "l2"])}
    tensors: dict[str, Any] = {"h_s": [normal(2, tokens, narrow if projected else wide) for _ in range(layers)]}
    tensors["h_t"] = [normal(2, tokens, wide) for _ in range(layers)]
    if projected:
        tensors["weight"] = [normal(wide, narrow, std=narrow**-0.5) for _ in range(layers)]
        if rng.random() < 0.7:
            tensors["bias"] = [normal(wide) for _ in range(layers)]
    if rng.random() < 0.5:
        tensors["mask"] = torch.rand(2, tokens, device=context.device) < 0.8
    if rng.random() < 0.3:
        tensors["sample_weight"] = torch.rand(2, device=context.device)
    if rng.random() < 0.4:
        tensors["gate"] = torch.tensor([rng.choice([1.0, 0.5, 0.0]) for _ in range(layers)], device=context.device)
    rest = [name for name in ("weight", "bias", "mask", "sample_weight", "gate") if name in tensors]
    words = f"{layers} x 2x{tokens}, {narrow if projected else wide} to {wide}, {dtype}, {options}, {rest}"
    return Call(words, "hidden_mses", tensors, ("h_s", "weight", "bias"), options, dtype)


VOCABULARIES = (97, 1000, 8003, 32000, 49408, 50257, 128256)


def _linear(rng: random.Random, context: Context, dtype: torch.dtype) -> Call:
    vocabulary = rng.choice((97, 203) if context.rehearse else VOCABULARIES)
    # A token's own gradient, times temperature and loss scale, is to fit into float16.
    tokens = rng.randint(
        8 if dtype == torch.float16 else 1, 30 if context.rehearse else 300 if vocabulary > 60000 else 900
    )
    widths = [rng.choice([24, 64, 128, rng.randint(1, 300)]) for _ in range(2)]
    return linear(rng, context, dtype, tokens, vocabulary, widths)


def linear(
    rng: random.Random, context: Context, dtype: torch.dtype, tokens: int, vocabulary: int, widths: list[int]
) -> Call:
    """A call of `linear_kl` at these sizes, with random options."""
    normal = _normal(context, dtype)
    tensors: dict[str, Any] = {}
    for side, width in zip("st", widths, strict=True):
        tensors[f"h_{side}"] = normal(tokens, width)
        tensors[f"w_{side}"] = normal(vocabulary, width, std=width**-0.5)
    if rng.random() < 0.4:
        tensors |= {"bias_s": normal(vocabulary), "bias_t": normal(vocabulary)}
    if rng.random() < 0.4:
        tensors["mask"] = torch.rand(tokens, device=context.device) < 0.8
    if rng.random() < 0.4:
        labels = torch.randint(0, vocabulary, (tokens,), device=context.device)
        tensors["labels"] = torch.where(torch.rand(tokens, device=context.device) < 0.7, labels, -100)
    if rng.random() < 0.3:
        tensors["gate"] = torch.tensor(rng.choice([1.0, 0.5, 0.0]), device=context.device)
    divergence = rng.choice(["forward", "forward", "reverse", "jsd"])
    options = {"divergence": divergence, "temperature": rng.choice([1.0, 2.0, 4.0])}
    rest = [name for name in ("bias_s", "mask", "labels", "gate") if name in tensors]
    words = f"{tokens} tokens of {vocabulary}, widths {widths}, {dtype}, {options}, {rest}"
    return Call(words, "linear_kl", tensors, ("h_s", "w_s", "bias_s"), options, dtype)
