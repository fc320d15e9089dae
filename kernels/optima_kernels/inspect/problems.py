"""What the engine, the recipes for large models and the options of the public losses launch, as calls without data.

Every problem calls a public function with tensors on the meta device, forward and backward; under
`fake_driver.launches_on` its kernels are compiled for a GPU. Sizes: the CoCa teachers and students of the recipes
(16 images a step of 257 or 577 tokens, 76 tokens of text, 256 of the pooler), language models, and edges.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optima_kernels import attention_map_losses, hidden_mses, linear_kl

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Problem:
    """One call of a loss, forward and backward.

    `fills_chip`: of a size at which every product should keep all of a GPU's multiprocessors busy. `sample`: among the
    few that stand for all. `may_refuse`: a ValueError is an answer, too.
    """

    name: str
    run: Callable[[], None]
    fills_chip: bool = False
    sample: bool = False
    may_refuse: bool = False


def empty(*shape: int, dtype: torch.dtype = BFLOAT16, trained: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)


@dataclass(frozen=True)
class Attention:
    """Sizes of the maps of `layers` equal layers, and the options of the call.

    `mask`: "bool" and "additive" have an entry for every query, "keys" one for every key of a sample; "lengths" stands
    for key_lengths. Student and teacher differ in width where two are given.
    """

    batch: int = 16
    heads: tuple[int, int] = (12, 12)
    key_heads: tuple[int, int] | None = None
    queries: int = 577
    keys: int = 577
    widths: tuple[int, int] = (64, 64)
    dtypes: tuple[torch.dtype, torch.dtype] = (BFLOAT16, BFLOAT16)
    key_dtype: torch.dtype | None = None
    kind: str = "kl"
    matching: str = "match"
    relation_heads: int | None = None
    causal: bool = False
    mask: str | None = None
    lse: bool = False
    gated: bool = True
    layers: int = 1
    trained: bool = True

    def __call__(self) -> None:
        sides: dict[str, Any] = {}
        for i, side in enumerate("st"):
            trained = self.trained and side == "s"
            key_heads = self.heads[i] if self.key_heads is None else self.key_heads[i]
            for name, heads, tokens in (("q", self.heads[i], self.queries), ("k", key_heads, self.keys)):
                dtype = self.dtypes[i] if self.key_dtype is None or name == "q" else self.key_dtype
                shape = (self.batch, tokens, heads, self.widths[i])
                leaves = [empty(*shape, dtype=dtype, trained=trained) for _ in range(self.layers)]
                sides[f"{name}_{side}"] = [x.transpose(1, 2) for x in leaves]  # as a projection leaves them
        options: dict[str, Any] = {"kind": self.kind, "heads": self.matching, "causal": self.causal}
        if self.relation_heads is not None:
            options["relation_heads"] = self.relation_heads
        if self.mask == "lengths":
            options["key_lengths"] = empty(self.batch, dtype=torch.int64)
        elif self.mask is not None:
            dtype = FLOAT32 if self.mask == "additive" else torch.bool
            rows = 1 if self.mask == "keys" else self.queries
            options["mask"] = empty(self.batch, 1, rows, self.keys, dtype=dtype)
        if self.lse:
            for i, side in enumerate("st"):
                options[f"lse_{side}"] = empty(self.batch, self.heads[i], self.queries, dtype=FLOAT32)
        gate = empty(self.layers, dtype=FLOAT32) if self.gated else None
        losses = attention_map_losses(**sides, **options, gate=gate, backend="triton")
        if self.trained:
            torch.autograd.grad(losses.sum(), [x for name in ("q_s", "k_s") for x in sides[name]])


@dataclass(frozen=True)
class Hidden:
    """States of `layers` equal layers. Under `autocast`, states and weights are float32, as the engine has them."""

    tokens: tuple[int, int] = (16, 577)
    widths: tuple[int, int] = (768, 1024)
    normalize: str | None = None
    projected: bool = True
    biased: bool = True
    masked: bool = False
    gated: bool = True
    layers: int = 1
    dtype: torch.dtype = BFLOAT16
    autocast: bool = False

    def __call__(self) -> None:
        narrow, wide = self.widths
        dtype = FLOAT32 if self.autocast else self.dtype

        def each(*shape: int, trained: bool = True) -> list[Tensor]:
            return [empty(*shape, dtype=dtype, trained=trained) for _ in range(self.layers)]

        with torch.autocast("cuda", BFLOAT16) if self.autocast else nullcontext():
            hidden_mses(
                each(*self.tokens, narrow if self.projected else wide),
                each(*self.tokens, wide, trained=False),
                each(wide, narrow) if self.projected else None,
                each(wide) if self.projected and self.biased else None,
                normalize=self.normalize,
                mask=empty(*self.tokens, dtype=torch.bool) if self.masked else None,
                gate=empty(self.layers, dtype=FLOAT32) if self.gated else None,
                backend="triton",
            ).sum().backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens, words and widths of student and teacher. Under `autocast` as `Hidden`."""

    tokens: int = 2048
    words: int = 49408
    widths: tuple[int, int] = (768, 1024)
    divergence: str = "forward"
    labelled: bool = False
    biased: bool = False
    masked: bool = False
    gated: bool = False
    dtype: torch.dtype = BFLOAT16
    autocast: bool = False

    def __call__(self) -> None:
        self.solve(*self.heads())

    def heads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States and heads of student and teacher."""
        dtype = FLOAT32 if self.autocast else self.dtype
        narrow, wide = self.widths
        h_s, w_s = (empty(rows, narrow, dtype=dtype, trained=True) for rows in (self.tokens, self.words))
        return h_s, w_s, empty(self.tokens, wide, dtype=dtype), empty(self.words, wide, dtype=dtype)

    def solve(self, *heads: Tensor) -> None:
        """The call, forward and backward."""
        dtype = heads[0].dtype
        with torch.autocast("cuda", BFLOAT16) if self.autocast else nullcontext():
            losses = linear_kl(
                *heads,
                bias_s=empty(self.words, dtype=dtype, trained=True) if self.biased else None,
                bias_t=empty(self.words, dtype=dtype) if self.biased else None,
                temperature=2.0,
                divergence=self.divergence,
                labels=empty(self.tokens, dtype=torch.int64) if self.labelled else None,
                mask=empty(self.tokens, dtype=torch.bool) if self.masked else None,
                gate=empty(dtype=FLOAT32) if self.gated else None,
                backend="triton",
            )
            total = losses[0] + 0.5 * losses[1] if isinstance(losses, tuple) else losses
            total.backward()  # type: ignore[no-untyped-call]


IMAGE = functools.partial(Attention, heads=(12, 16), matching="relation", relation_heads=16)
TEXT = functools.partial(Attention, heads=(8, 12), queries=76, keys=76, batch=64)
LANGUAGE = functools.partial(Attention, 4, (32, 32), (8, 8), 2048, 2048, (128, 128), causal=True, gated=False)


def problems() -> Iterator[Problem]:
    """All of them, by loss."""
    yield from _attention()
    yield from _hidden()
    yield from _vocabulary()


def _attention() -> Iterator[Problem]:
    def problem(name: str, call: Attention, **flags: bool) -> Problem:
        return Problem(f"attention {name}", call, **flags)

    for kind in ("kl", "mse"):
        yield problem(f"{kind} plain d64", Attention(kind=kind), fills_chip=True, sample=kind == "kl")
        for width in (80, 128):
            yield problem(f"{kind} plain d{width}", Attention(kind=kind, widths=(width, width)), fills_chip=True)
        yield problem(f"{kind} causal d64", Attention(kind=kind, causal=True), fills_chip=True)
        yield problem(f"{kind} causal d128", Attention(kind=kind, causal=True, widths=(128, 128)), fills_chip=True)
        for mask in ("bool", "keys", "additive", "lengths"):
            yield problem(f"{kind} {mask} d64", Attention(kind=kind, mask=mask), fills_chip=True)
        yield problem(f"{kind} lse d64, 12 layers", Attention(kind=kind, lse=True, layers=12), fills_chip=True)
        yield problem(f"{kind} lse causal d64", Attention(kind=kind, lse=True, causal=True), fills_chip=True)
        yield problem(f"{kind} all masks d64", Attention(kind=kind, mask="bool", causal=True))
        yield problem(f"{kind} relation, image, 12 layers", IMAGE(kind=kind, layers=12), fills_chip=True)
        tiny = IMAGE(kind=kind, heads=(6, 16), layers=6)
        yield problem(f"{kind} relation, image of tiny, 6 layers", tiny, fills_chip=True)
        yield problem(f"{kind} mean, image", Attention(kind=kind, heads=(12, 16), matching="mean"), fills_chip=True)
        text = TEXT(kind=kind, matching="relation", relation_heads=16, causal=True, layers=12)
        yield problem(f"{kind} relation, text, 12 layers", text, fills_chip=True)
        cross = TEXT(kind=kind, matching="relation", relation_heads=16, keys=255, layers=12)
        yield problem(f"{kind} relation, cross, 12 layers", cross, fills_chip=True)
        yield problem(f"{kind} mean, text", TEXT(kind=kind, matching="mean", causal=True, mask="bool"))
        yield problem(f"{kind} grouped keys d128 causal", LANGUAGE(kind=kind), fills_chip=True)
        yield problem(f"{kind} grouped keys d128 plain", LANGUAGE(kind=kind, causal=False), fills_chip=True)
        yield problem(f"{kind} float32 d64", Attention(kind=kind, dtypes=(FLOAT32, FLOAT32)), fills_chip=True)
        yield problem(f"{kind} float32 d128", Attention(kind=kind, dtypes=(FLOAT32, FLOAT32), widths=(128, 128)))
        for width in (64, 128):
            call = Attention(kind=kind, dtypes=(FLOAT16, FLOAT16), widths=(width, width))
            yield problem(f"{kind} float16 d{width}", call)
        yield problem(f"{kind} float32 teacher", Attention(kind=kind, dtypes=(BFLOAT16, FLOAT32)))
        yield problem(f"{kind} float32 keys", Attention(kind=kind, key_dtype=FLOAT32), may_refuse=True)
    yield problem("kl without gate d64", Attention(gated=False), fills_chip=True)
    yield problem("kl without gradients d64", Attention(trained=False), fills_chip=True)
    long = functools.partial(Attention, batch=4, queries=2048, keys=2048)
    yield problem("kl long, 12 layers", long(layers=12), fills_chip=True)
    for kind in ("kl", "mse"):
        yield problem(f"{kind} long causal lengths", long(kind=kind, causal=True, mask="lengths"), fills_chip=True)
    yield problem("kl bool without gradients d64", Attention(trained=False, mask="bool"), fills_chip=True)
    yield problem(
        "kl float32 without gradients d128", Attention(trained=False, widths=(128, 128), dtypes=(FLOAT32,) * 2)
    )
    yield problem("kl d32 and d96", Attention(widths=(32, 96)))
    yield problem("kl d256", Attention(widths=(256, 256)), may_refuse=True)
    yield problem("kl d256 bool", Attention(widths=(256, 256), mask="bool"), may_refuse=True)
    yield problem("kl relation of 2 heads", IMAGE(relation_heads=2), may_refuse=True)
    for queries, keys in ((1, 1), (1, 300), (300, 1)):
        yield problem(f"kl {queries} queries, {keys} keys", Attention(queries=queries, keys=keys, heads=(1, 1)))
    yield problem("kl 70000 samples", Attention(batch=70000, heads=(1, 1), queries=16, keys=16))


def _hidden() -> Iterator[Problem]:
    def problem(name: str, call: Hidden, **flags: bool) -> Problem:
        return Problem(f"hidden {name}", call, **flags)

    for normalize in (None, "layernorm", "l2"):
        plain = normalize or "plain"
        for layers in (1, 12):
            call = Hidden(normalize=normalize, layers=layers, autocast=True)
            first = normalize == "layernorm" and layers == 12
            yield problem(f"{plain}, {layers} layers", call, fills_chip=True, sample=first)
        yield problem(f"{plain} without gate", Hidden(normalize=normalize, gated=False, autocast=True), fills_chip=True)
        yield problem(f"{plain} masked, bf16", Hidden(normalize=normalize, masked=True, biased=False), fills_chip=True)
        text = Hidden((64, 76), (512, 768), normalize, layers=12, masked=True, autocast=True)
        yield problem(f"{plain} text, 12 layers", text, fills_chip=True)
        tiny = Hidden(widths=(384, 1024), normalize=normalize, layers=6, autocast=True)
        yield problem(f"{plain} tiny, 6 layers", tiny, fills_chip=True)
        yield problem(f"{plain} float32", Hidden(normalize=normalize, dtype=FLOAT32), fills_chip=True)
        yield problem(f"{plain} float16", Hidden(normalize=normalize, dtype=FLOAT16), fills_chip=True)
        for wide in (768, 4096, 16384):
            rows = Hidden(widths=(wide, wide), normalize=normalize, projected=False)
            yield problem(f"{plain} without projection, {wide}", rows)
    yield problem("layernorm of 32768 features", Hidden((1, 64), (64, 32768), "layernorm"), may_refuse=True)
    yield problem("odd widths", Hidden((3, 67), (45, 77), "layernorm", masked=True))
    yield problem("one token", Hidden((1, 1), (768, 1024), "layernorm"))


def _vocabulary() -> Iterator[Problem]:
    def problem(name: str, call: Vocabulary, **flags: bool) -> Problem:
        return Problem(f"vocabulary {name}", call, **flags)

    for divergence in ("forward", "reverse", "jsd"):
        for labelled in (False, True):
            for gated in (False, True):
                name = f"{divergence}{', labels' if labelled else ''}{', gate' if gated else ''}"
                call = Vocabulary(divergence=divergence, labelled=labelled, gated=gated, autocast=True)
                yield problem(name, call, fills_chip=not gated)
        call = Vocabulary(divergence=divergence, biased=True, masked=True, labelled=True)
        yield problem(f"{divergence}, labels, bias, mask, bf16", call, fills_chip=True)
    for tokens, words, widths in (
        (4096, 50257, (1024, 1024)),
        (8192, 128256, (2048, 4096)),
        (64 * 1024, 256, (512, 768)),
        (2048, 256000, (2048, 3584)),
    ):
        for gated in (False, True):
            call = Vocabulary(tokens, words, widths, gated=gated)
            name = f"forward, {tokens} tokens of {words}{', gate' if gated else ''}"
            yield problem(name, call, fills_chip=not gated, sample=gated and words == 50257)
    yield problem("forward float32", Vocabulary(dtype=FLOAT32), fills_chip=True)
    yield problem("forward float16", Vocabulary(dtype=FLOAT16), fills_chip=True)
    yield problem("forward, one token of 97", Vocabulary(1, 97, (45, 77)))
