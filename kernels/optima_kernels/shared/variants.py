"""Which of a loss's kernels a call takes, by name, and a small random problem that takes the same.

A variant is a text of options such as "kind=kl causal=1 mask=bool": everything that makes Triton compile another kernel
and may make it right or wrong, and nothing that does not. A text, because `torch.compile` takes texts for constants.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of the layers of a problem behind gates: the closed one is between open ones, so that what it writes into its
# neighbours shows.
GATES = (1.0, 0.0, 0.5)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Problem(NamedTuple):
    """One call of a loss: its arguments, tensors and lists of those among them, and which of them get gradients."""

    arguments: dict[str, Any]
    trained: tuple[str, ...]
    dtype: torch.dtype  # the narrowest of its tensors


def attention_variant(
    q_s: Sequence[Tensor],
    k_s: Sequence[Tensor],
    q_t: Sequence[Tensor],
    *,
    kind: str,
    heads: str,
    relation_heads: int | None,
    causal: bool,
    mask: Sequence[Tensor | None],
    key_lengths: Sequence[Tensor | None],
    lse_s: Sequence[Tensor | None],
    lse_t: Sequence[Tensor | None],
    gate: Tensor | None,
) -> str:
    """Of the first layer, for layers of a module are alike, and of the maps that are compared."""
    grouped = relation_heads is None and q_s[0].shape[1] != k_s[0].shape[1]
    parts = (1, 1) if relation_heads is None else [relation_heads / q[0].shape[1] for q in (q_s, q_t)]
    widths = [int(q[0].shape[-1] / part) for q, part in zip((q_s, q_t), parts, strict=True)]
    masked = "none" if mask[0] is None else "bool" if mask[0].dtype == torch.bool else "additive"
    return (
        f"kind={kind} mean={heads == 'mean':d} causal={causal:d} mask={masked} lengths={key_lengths[0] is not None:d} "
        f"lse={lse_s[0] is not None:d}{lse_t[0] is not None:d} gate={gate is not None:d} "
        f"grouped={grouped:d} dtypes={_name(q_s[0].dtype)},{_name(q_t[0].dtype)} "
        f"widths={','.join(str(_power(max(width, 16))) for width in widths)}"
    )


def hidden_variant(
    h_s: Tensor,
    h_t: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    normalize: str | None,
    counted: bool,
    gate: Tensor | None,
    operands: torch.dtype | None,
) -> str:
    """Of the first layer. `operands`: the dtype of autocast, which states and weights are converted to."""
    row = 0 if weight is not None else _power(h_t.shape[-1])
    return (
        f"normalize={normalize or 'none'} weight={weight is not None:d} bias={bias is not None:d} counted={counted:d} "
        f"gate={gate is not None:d} dtypes={_name(operands or h_s.dtype)},{_name(operands or h_t.dtype)} row={row}"
    )


def logits_variant(
    h_s: Tensor,
    w_s: Tensor,
    *,
    divergence: str,
    bias: bool,
    labels: str,
    gate: Tensor | None,
    operands: torch.dtype | None,
) -> str:
    """`operands` as in `hidden_variant`; `labels` is "none", "weighted" where the weight of their loss is known, or
    "apart"."""
    whole = w_s.shape[0] % 16 == 0
    return (
        f"divergence={divergence} bias={bias:d} labels={labels} gate={gate is not None:d} "
        f"dtypes={_name(operands or h_s.dtype)},{_name(operands or w_s.dtype)} whole={whole:d}"
    )


def _name(dtype: torch.dtype) -> str:
    return DTYPES.get(dtype, "fp32")


def _power(size: int) -> int:
    """Head widths and rows are padded to powers of two."""
    return 1 << (size - 1).bit_length()


def usual(loss: str) -> list[str]:
    """What the engine's defaults take, in float32 and in bfloat16."""
    return [_completed(loss, text) for text in USUAL[loss]]


def _completed(loss: str, text: str) -> str:
    given = dict(pair.split("=") for pair in text.split())
    return " ".join(f"{name}={value}" for name, value in (DEFAULTS[loss] | given).items())


DEFAULTS: dict[str, dict[str, str]] = {
    "attention_map_losses": {
        "kind": "kl",
        "mean": "0",
        "causal": "0",
        "mask": "none",
        "lengths": "0",
        "lse": "00",
        "gate": "1",
        "grouped": "0",
        "dtypes": "bf16,bf16",
        "widths": "64,64",
    },
    "hidden_mses": {
        "normalize": "layernorm",
        "weight": "1",
        "bias": "1",
        "counted": "0",
        "gate": "1",
        "dtypes": "bf16,bf16",
        "row": "0",
    },
    "linear_kl": {
        "divergence": "forward",
        "bias": "0",
        "labels": "none",
        "gate": "0",
        "dtypes": "bf16,bf16",
        "whole": "1",
    },
}

USUAL: dict[str, tuple[str, ...]] = {
    "attention_map_losses": (
        "",
        "causal=1",
        "lengths=1 dtypes=fp32,fp32",
        "kind=mse mask=bool",
        "mean=1",
        "lse=11",
    ),
    "hidden_mses": (
        "",
        "counted=1",
        "normalize=none gate=0",
        "normalize=l2 dtypes=fp32,fp32",
        "weight=0 bias=0 row=64",
    ),
    "linear_kl": (
        "",
        "divergence=jsd labels=apart bias=1",
        "labels=weighted",
        "gate=1",
        "divergence=reverse whole=0",
        "dtypes=fp32,fp32",
    ),
}


def problem_of(loss: str, variant: str) -> Problem:
    """A problem that takes the kernels of the variant, always the same."""
    options = dict(pair.split("=") for pair in variant.split())
    dtypes = [next(dtype for dtype, name in DTYPES.items() if name == text) for text in options["dtypes"].split(",")]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    make = {"attention_map_losses": _attention, "hidden_mses": _hidden, "linear_kl": _logits}[loss]
    arguments, trained = make(options, dtypes, draw)
    return Problem(arguments, trained, min(dtypes, key=lambda dtype: dtype.itemsize))


Made = tuple[dict[str, Any], tuple[str, ...]]
Draw = Callable[..., Tensor]


def _attention(options: dict[str, str], dtypes: list[torch.dtype], draw: Draw) -> Made:
    """Layers of 80 queries and keys, so that the last tiles are not full."""
    gates = GATES if options["gate"] == "1" else GATES[:1]
    tokens, heads = 80, 2
    key_heads = 1 if options["grouped"] == "1" else heads
    student, teacher = (int(width) for width in options["widths"].split(","))
    sides = {
        "q_s": (heads, student, dtypes[0]),
        "k_s": (key_heads, student, dtypes[0]),
        "q_t": (heads, teacher, dtypes[1]),
        "k_t": (key_heads, teacher, dtypes[1]),
    }
    arguments: dict[str, Any] = {
        name: [draw(2, count, tokens, width).to(dtype) for _ in gates] for name, (count, width, dtype) in sides.items()
    }
    arguments |= {"kind": options["kind"], "causal": options["causal"] == "1"}
    arguments["sample_weight"] = torch.tensor([1.0, 2.0])
    if options["mean"] == "1":
        arguments["heads"] = "mean"
    maps = 1 if options["mean"] == "1" else heads
    if options["mask"] != "none":
        allowed = draw(2, maps, tokens, tokens) > -0.5
        bias = draw(2, maps, tokens, tokens).masked_fill(~allowed, -torch.inf)
        arguments["mask"] = allowed if options["mask"] == "bool" else bias
    if options["lengths"] == "1":
        arguments["key_lengths"] = torch.tensor([80, 33])
    if options["gate"] == "1":
        arguments["gate"] = torch.tensor(gates)
    for side, given in zip("st", options["lse"], strict=True):
        if given == "1":
            arguments[f"lse_{side}"] = [_lse(q, k, arguments) for q, k in _pairs(arguments, side)]
    return arguments, ("q_s", "k_s")


def _pairs(arguments: dict[str, Any], side: str) -> list[tuple[Tensor, Tensor]]:
    return list(zip(arguments[f"q_{side}"], arguments[f"k_{side}"], strict=True))


def _lse(q: Tensor, k: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Of the scores that the mask, the lengths and causality leave."""
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    mask = arguments.get("mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if arguments["causal"]:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if "key_lengths" in arguments:
        beyond = torch.arange(k.shape[2]) >= arguments["key_lengths"][:, None]
        scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
    lse: Tensor = scores.logsumexp(-1).float()
    return lse


def _hidden(options: dict[str, str], dtypes: list[torch.dtype], draw: Draw) -> Made:
    """Layers of 75 tokens, projected from 48 to 160 features or as wide as their class."""
    gates = GATES if options["gate"] == "1" else GATES[:1]
    projected = options["weight"] == "1"
    wide = 160 if projected else max(int(options["row"]) - 1, 1)
    narrow = 48 if projected else wide
    arguments: dict[str, Any] = {
        "h_s": [draw(3, 25, narrow).to(dtypes[0]) for _ in gates],
        "h_t": [draw(3, 25, wide).to(dtypes[1]) for _ in gates],
        "normalize": None if options["normalize"] == "none" else options["normalize"],
    }
    if projected:
        arguments["weight"] = [(draw(wide, narrow) * narrow**-0.5).to(dtypes[0]) for _ in gates]
    if options["bias"] == "1":
        arguments["bias"] = [draw(wide).to(dtypes[0]) for _ in gates]
    if options["counted"] == "1":
        arguments["mask"] = torch.arange(25) < torch.tensor([[25], [7], [16]])
    if options["gate"] == "1":
        arguments["gate"] = torch.tensor(gates)
    return arguments, ("h_s", "weight", "bias") if projected else ("h_s",)


def _logits(options: dict[str, str], dtypes: list[torch.dtype], draw: Draw) -> Made:
    """70 tokens, of which some do not count, and a vocabulary of two tiles and a part of one, 4208 or 4203 words."""
    vocabulary = 4208 if options["whole"] == "1" else 4203
    arguments: dict[str, Any] = {
        "h_s": draw(70, 48).to(dtypes[0]),
        "w_s": (draw(vocabulary, 48) * 48**-0.5).to(dtypes[1]),
        "h_t": draw(70, 64).to(dtypes[0]),
        "w_t": (draw(vocabulary, 64) * 64**-0.5).to(dtypes[1]),
        "temperature": 2.0,
        "divergence": options["divergence"],
        "mask": torch.arange(70) % 9 != 0,
    }
    if options["bias"] == "1":
        arguments |= {"bias_s": draw(vocabulary).to(dtypes[1]), "bias_t": draw(vocabulary).to(dtypes[1])}
    if options["labels"] != "none":
        arguments["labels"] = torch.where(torch.arange(70) % 5 == 0, -100, torch.arange(70) * 2)
    if options["labels"] == "weighted":
        arguments["label_weight"] = 0.5
    if options["gate"] == "1":
        arguments["gate"] = torch.tensor(0.5)
    return arguments, ("h_s", "w_s", "bias_s") if options["bias"] == "1" else ("h_s", "w_s")
