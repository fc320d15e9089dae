"""Random attention-map problems, and the float64 answer to them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from kernel_support import assert_agree
from torch import Tensor

from optima_kernels import attention_map_loss, reference

STUDENT = ("q_s", "k_s")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
NAMES = ("loss", "gradient of q_s", "gradient of k_s")


@dataclass(frozen=True)
class Case:
    """Tensors and options of one call; `generator_seed` is printed by hypothesis with a failing example."""

    generator_seed: int
    batch: int = 2
    heads_s: int = 3
    heads_t: int = 3
    group_s: int = 1  # query heads that share a key head
    group_t: int = 1
    queries: int = 19
    keys: int = 23
    width_s: int = 16
    width_t: int = 24
    dtype: torch.dtype = torch.float32
    dtype_k: torch.dtype | None = None  # of k_s, where it is another
    dtype_t: torch.dtype | None = None  # of the teacher
    mask: str | None = None
    key_lengths: bool = False
    sample_weight: bool = False
    gate: float | None = None
    lse: str = ""  # sides whose log-sum-exps are given
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=lambda: {"kind": "kl"})

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensor arguments, the same values at every call."""
        generator = torch.Generator().manual_seed(self.generator_seed)

        def normal(own: torch.dtype | None, *shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(own or self.dtype).to(dtype or own or self.dtype)

        keys_s, keys_t = self.heads_s // self.group_s, self.heads_t // self.group_t
        result = {
            "q_s": normal(None, self.batch, self.heads_s, self.queries, self.width_s),
            "k_s": normal(self.dtype_k, self.batch, keys_s, self.keys, self.width_s),
            "q_t": normal(self.dtype_t, self.batch, self.heads_t, self.queries, self.width_t),
            "k_t": normal(self.dtype_t, self.batch, keys_t, self.keys, self.width_t),
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
        return result | {f"lse_{side}": self._log_sums(side, result) for side in self.lse}

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
        if self.mask == "additive per sample":
            return bias[:, :1, :1].masked_fill(forbidden[:, :1, :1], -torch.inf)
        if self.mask == "additive lowest":
            return bias[0, 0].masked_fill(forbidden[0, 0], torch.finfo(bias.dtype).min)
        assert self.mask == "cls"  # causal text with a last query that sees all but padding, as in CoCa
        causal = torch.ones(self.queries, self.keys, dtype=torch.bool).tril()
        causal[-1] = ~forbidden[0, 0, 0]
        return causal

    def _log_sums(self, side: str, tensors: dict[str, Tensor]) -> Tensor:
        """Of every row of masked, scaled scores, as a forward pass hands them out.

        NaN where a row has no key, which nobody may look at.
        """
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        q, k = tensors[f"q_{side}"].double(), tensors[f"k_{side}"].double()
        k = torch.stack([k[:, h * k.shape[1] // q.shape[1]] for h in range(q.shape[1])], 1)
        scale = self.options.get(f"scale_{side}") or q.shape[-1] ** -0.5
        scores = q @ k.transpose(-1, -2) * scale
        o_i, o_j = torch.arange(self.queries)[:, None], torch.arange(self.keys)
        if self.options.get("causal", False):
            scores = scores.masked_fill(o_j > o_i, -torch.inf)
        if "key_lengths" in tensors:
            scores = scores.masked_fill(o_j >= tensors["key_lengths"][:, None, None, None], -torch.inf)
        mask = tensors.get("mask")
        if mask is not None and mask.is_floating_point():
            scores = (scores + mask).masked_fill(mask == torch.finfo(mask.dtype).min, -torch.inf)
        elif mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        log_sums = scores.logsumexp(-1)
        return log_sums.masked_fill(log_sums == -torch.inf, torch.nan).to(dtype)


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


def rounding_of_scores(case: Case) -> float:
    """What roundings of scores and log-sum-exps may leave of a loss or a gradient that is 0, or nearly.

    Maps that should be equal then differ by the float32 spacing of their scores, and so do their logarithms.
    """
    tensors = case.tensors(torch.float64)
    largest, reach = 1.0, 1.0
    for side in ("s", "t"):
        q, k = (tensors[f"{name}_{side}"].nan_to_num().norm(dim=-1).max().item() for name in "qk")
        scale = case.options.get(f"scale_{side}") or tensors[f"q_{side}"].shape[-1] ** -0.5
        largest, reach = max(largest, q * k * scale), max(reach, q, k)
    bias = tensors.get("mask")
    if bias is not None and bias.is_floating_point():
        largest += bias.masked_fill(bias <= torch.finfo(bias.dtype).min, 0.0).abs().max().item()
    return torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps * largest * reach


def widest_error(case: Case, tolerances: dict[torch.dtype, float]) -> tuple[float, torch.dtype]:
    """The tolerance of the coarsest dtype of a case, and that dtype."""
    used = [x for x in (case.dtype, case.dtype_k, case.dtype_t) if x is not None]
    return max((tolerances[dtype], i, dtype) for i, dtype in enumerate(used))[::2]


def cases(dtypes: tuple[torch.dtype, ...], widths: tuple[int, ...], most_tokens: int) -> st.SearchStrategy[Case]:
    """Shapes, groups, masks, head options, scales, known rows, layouts and dtypes, drawn independently."""
    count, tokens, width = st.integers(1, 3), st.integers(1, most_tokens), st.sampled_from(widths)
    heads, group = st.integers(1, 4), st.sampled_from([1, 1, 2, 3, 4])
    scale = st.sampled_from([None, 0.3])
    other = st.sampled_from([None, None, None, *dtypes])
    options = st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["kl", "mse"]),
            "heads": st.sampled_from(["match", "match", "mean", "relation"]),
            "causal": st.booleans(),
            "scale_s": scale,
            "scale_t": scale,
        }
    )
    masks = st.sampled_from(
        [None, None, "bool", "bool per sample", "additive", "additive per sample", "additive lowest", "cls"]
    )
    drawn = st.builds(
        Case,
        generator_seed=st.integers(0, 2**31),
        batch=count,
        heads_s=heads,
        heads_t=heads,
        group_s=group,
        group_t=group,
        queries=tokens,
        keys=tokens,
        width_s=width,
        width_t=width,
        dtype=st.sampled_from(dtypes),
        dtype_k=other,
        dtype_t=other,
        mask=masks,
        key_lengths=st.booleans(),
        sample_weight=st.booleans(),
        gate=st.sampled_from([None, None, 1.0, 0.25]),
        lse=st.sampled_from(["", "", "s", "t", "st"]),
        layout=st.sampled_from(list(LAYOUTS)),
        options=options,
    )
    return drawn.map(_consistent)


def _consistent(case: Case) -> Case:
    heads_t = case.heads_s if case.options["heads"] == "match" else case.heads_t
    group_s = case.group_s if case.heads_s % case.group_s == 0 else 1
    group_t = case.group_t if heads_t % case.group_t == 0 else 1
    case = replace(case, heads_t=heads_t, group_s=group_s, group_t=group_t)
    if case.options["heads"] == "relation":
        relation_heads = 2 if case.width_s % 2 == 0 and case.width_t % 2 == 0 else 1
        return replace(case, lse="", options=case.options | {"relation_heads": relation_heads})
    return case


def check(case: Case, backend: str, device: torch.device) -> None:
    """Asserts that a backend gives the float64 answer to the rounding of the case's dtypes."""
    tensors = {name: x.to(device) for name, x in case.tensors().items()}
    actual = loss_and_gradients(attention_map_loss, tensors, backend=backend, **case.options)
    named = dict(zip(NAMES, (x.cpu() for x in actual), strict=True))

    def solve() -> dict[str, Tensor]:
        return dict(zip(NAMES, expected(case), strict=True))

    tolerance, dtype = widest_error(case, TOLERANCE)
    exact, rounding = solve(), rounding_of_scores(case)
    floors = {name: rounding if x.square().mean().sqrt() <= rounding else 0.0 for name, x in exact.items()}
    assert_agree(named, exact, tolerance, solve, dtype, backend, floors)
