"""q and k as the attentions of transformers compare them: rotated and normalised, key heads not yet repeated.

Nearly every model of transformers hands q, k, v and mask to one function, which its configuration names ("sdpa",
"eager"). Under the names "optima_sdpa" and "optima_eager" stands a function that calls the model's own and, while a
pass is tapped, keeps references to what it was given. Masks are those that the model makes for its own function.
"""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from optima_core.errors import OptimaError

_PREFIX = "optima_"
_OWN = ("sdpa", "eager")

_UNLIKE = {
    "softcap": "its scores are soft-capped",
    "s_aux": "attention sinks take a share of each row",
    "position_bias": "position biases are added to its scores",
}
"""Arguments of an attention that change its map, and what they do."""


class AttentionCall(NamedTuple):
    """What an attention was given.

    q: [B, H, N, d]. k: [B, H_k, M, d]. scale: factor of the scores. causal: query i sees keys 0..i only.
    mask: as given: None, bool [B, 1 or H, N, M], or float, which is added to the scores.
    unlike: "", or what else makes its map.
    """

    q: Tensor
    k: Tensor
    scale: float | None
    causal: bool
    mask: Tensor | None
    unlike: str


Calls = dict[nn.Module, list[AttentionCall]]
"""Attention module -> its calls in one pass, in order; packed images give one each."""

_lent: ContextVar[tuple[Collection[nn.Module], Calls] | None] = ContextVar("lent", default=None)
"""The modules that are to lend, and what they lent."""


@contextlib.contextmanager
def lending(modules: Collection[nn.Module]) -> Iterator[Calls]:
    """Within, those of these modules that are attentions lend what they are given, in order of their first calls."""
    calls: Calls = {}
    token = _lent.set((modules, calls))
    try:
        yield calls
    finally:
        _lent.reset(token)


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The outermost model of transformers, which PEFT or a module of one's own may have wrapped.

    Raises OptimaError if there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise OptimaError(f"{type(model).__name__} holds no model of transformers; take optima_core.Adaptor")


def lend_attention(model: nn.Module) -> None:
    """Lets the attentions of all of a model's parts go through the lending functions; what they compute stays.

    Raises OptimaError if a part's attention cannot be read.
    """
    for own in _OWN:
        ALL_ATTENTION_FUNCTIONS.register(_PREFIX + own, _lending_function(own))
        ALL_MASK_ATTENTION_FUNCTIONS.register(_PREFIX + own, ALL_MASK_ATTENTION_FUNCTIONS[own])
    pretrained(model)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    names = [_implementation(part).removeprefix(_PREFIX) for part in parts]
    for part, name in zip(parts, names, strict=True):
        if name not in _OWN:
            raise OptimaError(
                f"{type(part).__name__} computes attention by {name!r}, whose masks cannot be read; load it with "
                'attn_implementation="sdpa"'
            )
    # Outer ones first, for each also sets its inner ones.
    for part, name in zip(parts, names, strict=True):
        if _implementation(part) != _PREFIX + name:
            part.set_attn_implementation(_PREFIX + name)
        if _implementation(part) != _PREFIX + name:
            raise OptimaError(
                f"{type(part).__name__} does not compute attention through transformers' attention interface; name its "
                "layers and projections in an optima_core.Adaptor"
            )


def _implementation(part: PreTrainedModel) -> str:
    return str(part.config._attn_implementation)


def _lending_function(own: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
    ) -> Any:
        lent = _lent.get()
        if lent is not None and module in lent[0]:
            lent[1].setdefault(module, []).append(_call(module, query, key, attention_mask, own, named))
        return _own_function(module, own)(module, query, key, value, attention_mask, **named)

    return attention


def _call(
    module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, own: str, named: dict[str, Any]
) -> AttentionCall:
    is_causal = named.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # The eager functions take causality from the mask alone.
    causal = own == "sdpa" and mask is None and q.shape[2] > 1 and bool(is_causal)
    unlike = [what for name, what in _UNLIKE.items() if named.get(name) is not None]
    if causal and q.shape[2] != k.shape[2]:
        unlike.append("its keys include those of earlier calls (pass use_cache=False)")
    return AttentionCall(q, k, named.get("scaling"), causal, mask, ", and ".join(unlike))


def _own_function(module: nn.Module, own: str) -> Callable[..., Any]:
    """The attention that this model would have called: some files of transformers replace the common one."""
    for kind in type(module).__mro__:
        home = sys.modules[kind.__module__]
        if own == "eager" and hasattr(home, "eager_attention_forward"):
            return home.eager_attention_forward  # type: ignore[no-any-return]
        if own == "sdpa" and hasattr(home, "ALL_ATTENTION_FUNCTIONS"):
            return home.ALL_ATTENTION_FUNCTIONS["sdpa"]  # type: ignore[no-any-return]
    raise OptimaError(f"{type(module).__name__} has no {own} attention of its own")


def only_forbids(mask: Tensor) -> bool:
    """Whether a float mask holds 0 and the lowest values alone; the host reads it."""
    return bool(((mask == 0) | forbidden(mask)).all())


def forbidden(mask: Tensor) -> Tensor:
    """bool, where a float mask forbids: transformers writes the lowest value of the dtype, or -inf."""
    return mask <= torch.finfo(mask.dtype).min / 2
