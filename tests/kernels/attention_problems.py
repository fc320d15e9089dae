"""Random attention-map problems, and the float64 answer to them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from optima_kernels import reference

STUDENT = ("q_s", "k_s")


@dataclass(frozen=True)
class Case:
    """Tensors and options of one call; `generator_seed` is printed by hypothesis with a failing example."""

    generator_seed: int
    batch: int = 2
    heads_s: int = 3
    heads_t: int = 3
    queries: int = 19
    keys: int = 23
    width_s: int = 16
    width_t: int = 24
    dtype: torch.dtype = torch.float32
    mask: str | None = None
    key_lengths: bool = False
    sample_weight: bool = False
    gate: float | None = None
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=lambda: {"kind": "kl"})

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensor arguments, the same values at every call."""
        generator = torch.Generator().manual_seed(self.generator_seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype).to(dtype or self.dtype)

        result = {
            "q_s": normal(self.batch, self.heads_s, self.queries, self.width_s),
            "k_s": normal(self.batch, self.heads_s, self.keys, self.width_s),
            "q_t": normal(self.batch, self.heads_t, self.queries, self.width_t),
            "k_t": normal(self.batch, self.heads_t, self.keys, self.width_t),
        }
        result = {name: LAYOUTS[self.layout](x) for name, x in result.items()}
        mask = self._mask(generator)
        if mask is not None:
            result["mask"] = mask
        if self.key_lengths:
            result["key_lengths"] = torch.randint(0, self.keys + 1, (self.batch,), generator=generator)
        if self.sample_weight:
            result["sample_weight"] = torch.rand(self.batch, generator=generator)
        if self.gate is not None:
            result["gate"] = torch.tensor(self.gate)
        return result

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        if self.mask is None:
            return None
        maps = {"match": self.heads_s, "mean": 1}.get(
            self.options.get("heads", "match"), self.options.get("relation_heads", 1)
        )
        full = (self.batch, maps, self.queries, self.keys)
        forbidden = torch.rand(full, generator=generator) < 0.6
        bias = torch.randn(full, generator=generator)
        if self.mask == "bool":
            return ~forbidden
        if self.mask == "bool per sample":
            return ~forbidden[:, :1, :1]
        if self.mask == "additive":
            return bias.masked_fill(forbidden, -torch.inf)
        if self.mask == "additive lowest":
            return bias[0, 0].masked_fill(forbidden[0, 0], torch.finfo(bias.dtype).min)
        assert self.mask == "cls"  # causal text with a last query that sees all but padding, as in CoCa
        causal = torch.ones(self.queries, self.keys, dtype=torch.bool).tril()
        causal[-1] = ~forbidden[0, 0, 0]
        return causal


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "one sample expanded": lambda x: x[:1].expand_as(x),
}


def loss_and_gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any
) -> tuple[Tensor, ...]:
    """The loss and its gradients to q_s and k_s."""
    leaves = {name: x.detach().requires_grad_() if name in STUDENT else x for name, x in tensors.items()}
    loss = function(**leaves, **options)
    return (loss.detach(), *torch.autograd.grad(loss, [leaves[name] for name in STUDENT]))


def expected(case: Case) -> tuple[Tensor, ...]:
    """By the reference in float64, from the values that the case's dtype holds."""
    return loss_and_gradients(reference.attention_map_loss, case.tensors(torch.float64), **case.options)


def cases(dtypes: tuple[torch.dtype, ...], widths: tuple[int, ...], most_tokens: int) -> st.SearchStrategy[Case]:
    """Shapes, masks, head options, scales, layouts and dtypes, drawn independently."""
    count, tokens, width = st.integers(1, 3), st.integers(1, most_tokens), st.sampled_from(widths)
    scale = st.sampled_from([None, 0.3])
    options = st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["kl", "mse"]),
            "heads": st.sampled_from(["match", "match", "mean", "relation"]),
            "causal": st.booleans(),
            "scale_s": scale,
            "scale_t": scale,
        }
    )
    masks = st.sampled_from([None, None, "bool", "bool per sample", "additive", "additive lowest", "cls"])
    drawn = st.builds(
        Case,
        generator_seed=st.integers(0, 2**31),
        batch=count,
        heads_s=count,
        heads_t=count,
        queries=tokens,
        keys=tokens,
        width_s=width,
        width_t=width,
        dtype=st.sampled_from(dtypes),
        mask=masks,
        key_lengths=st.booleans(),
        sample_weight=st.booleans(),
        gate=st.sampled_from([None, None, 1.0, 0.25]),
        layout=st.sampled_from(list(LAYOUTS)),
        options=options,
    )
    return drawn.map(_consistent)


def _consistent(case: Case) -> Case:
    if case.options["heads"] == "match":
        return replace(case, heads_t=case.heads_s)
    if case.options["heads"] == "relation":
        relation_heads = 2 if case.width_s % 2 == 0 and case.width_t % 2 == 0 else 1
        return replace(case, options=case.options | {"relation_heads": relation_heads})
    return case
