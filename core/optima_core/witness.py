"""Are q and k of a layer's projections what its attention really compares? Seen once, while a model runs.

Between its projections and its scores a model may rotate q and k by their positions, normalise them, scale them anew or
add biases. So one forward pass is watched: what torch's fused attention, or a softmax, was given right after the
projections ran is set beside q k^T / sqrt(d) of their outputs. Attention that goes through neither (a kernel of a
library's own) cannot be watched and is taken on trust.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_FORBIDDEN = -1e4
"""A score below is a pair that a float mask forbids."""


class Witness(TorchFunctionMode):
    """Records, by the key that was last `expected`, the scores that attention computed next."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[Any, Tensor] = {}
        self._expected: Any = None
        self._awaits = False

    @property
    def awaited(self) -> bool:
        """Whether there is anything to watch for."""
        return self._awaits

    def expect_after(self, projections: Sequence[nn.Module], key: Any) -> list[torch.utils.hooks.RemovableHandle]:
        """The first attention after these submodules ran belongs to `key`."""
        self._awaits = True

        def expect(*_: Any) -> None:
            self._expected = key

        return [module.register_forward_hook(expect) for module in projections]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        if self._expected is not None:
            if function is F.scaled_dot_product_attention:
                self._keep(_fused_scores(*arguments, **named))
            elif function in (torch.softmax, Tensor.softmax, F.softmax) and arguments and arguments[0].dim() == 4:
                self._keep(arguments[0].detach())
        return function(*arguments, **named)

    def _keep(self, scores: Tensor) -> None:
        self.scores[self._expected] = scores
        self._expected = None


def unlike_scores(scores: Tensor, q: Tensor, k: Tensor, *, causal: bool) -> str:
    """What is wrong with q k^T / sqrt(d) as the scores that attention computed; "" if nothing is.

    scores: [B, H, N, M], forbidden pairs below -1e4. q: [B, H, N, d]. k: [B, H_k, M, d]. What all pairs of a query
    share does not count, for softmax takes it out.
    """
    k = k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    ours = torch.matmul(q.detach().float(), k.detach().float().transpose(2, 3)) * q.shape[-1] ** -0.5
    if ours.shape != scores.shape:
        return f"the attention has scores of shape {list(scores.shape)}, these q and k give {list(ours.shape)}"
    counts = scores > _FORBIDDEN
    if not causal and ours.shape[2] == ours.shape[3] > 1 and not counts.triu(1).any():
        return "the attention sees no later token, but its LayerPaths say causal=False"
    ours, theirs = (_centred(x, counts) for x in (ours, scores.float()))
    error = float((ours - theirs).norm() / theirs.norm().clamp(min=torch.finfo(torch.float32).tiny))
    # Half precision rounds the share that all pairs have, too, which may be far larger than what is left of it.
    if error <= (1e-3 if q.dtype in (torch.float32, torch.float64) else 0.25):
        return ""
    return (
        f"the attention's scores are not q k^T / sqrt(d) of these outputs but {error:.0%} off (rotary positions, "
        "norms, biases or another scale come between)"
    )


def _centred(scores: Tensor, counts: Tensor) -> Tensor:
    kept = scores.masked_fill(~counts, 0.0)
    mean = kept.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
    return (kept - mean).masked_fill(~counts, 0.0)


@torch.no_grad()
def _fused_scores(
    q: Tensor,
    k: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's fused attention takes the softmax of, with its signature."""
    if q.dim() == 4 and k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.matmul(q.float(), k.float().transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores
