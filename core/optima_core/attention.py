"""Attention that also hands out the log-sum-exp rows which its fused kernel computes anyway.

`F.scaled_dot_product_attention` throws them away; the attention-map loss can use them (`AttentionTap.lse`) instead of
computing the same sums again. The same kernels are called here one level deeper, so output and gradients are the
same bits, and rows that nobody keeps cost nothing. Where flash-attn is installed, its kernel takes the place of torch's
on CUDA.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(d) + mask) v, and the log-sum-exp of each row of scores where a fused kernel gives it.

    Args:
        q: [B, H, N, d].
        k: [B, H, M, d].
        v: [B, H, M, d].
        mask: bool, broadcasts to [B, H, N, M], True attends; instead of `causal`, not beside it.
        causal: query i attends to keys 0..i only.

    Returns:
        The output [B, H, N, d], and natural log-sum-exps of the scaled, masked scores [B, H, N], without a gradient;
        None where torch's choice is not the flash kernel: on a CPU when it is switched off (`precision.arithmetic` does
        that for bf16), on CUDA with a mask, fp32, or a head width that is no multiple of 8. Of a row that attends to
        nothing the log-sum-exp means nothing.
    """
    if q.device.type == "cpu" and _flash_enabled("cpu"):
        bias = None if mask is None else q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = flash_cpu(q, k, v, 0.0, causal, attn_mask=_four_dimensional(bias))
        return output, lse
    if _flash_on_cuda(q, k, mask, causal):
        if flash_attn_func is not None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            output, lse, _ = flash_attn_func(q, k, v, causal=causal, deterministic=True, return_attn_probs=True)
            return output.transpose(1, 2), lse
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return output, lse
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal), None


def _four_dimensional(bias: Tensor | None) -> Tensor | None:
    """The kernel takes two dimensions or four."""
    return bias if bias is None or bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]


def _flash_on_cuda(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> bool:
    queries, width = q.shape[2:]
    fits = q.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    unmasked = mask is None and (not causal or queries == k.shape[2])
    return q.device.type == "cuda" and fits and unmasked and _flash_enabled("cuda")


def _flash_enabled(device: str) -> bool:
    """Whether torch may use its flash kernel: a property of the process, which a graph may take as it is."""
    if not torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
        return False
    return device == "cpu" or (
        torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)
    )


# What `torch.compiler.assume_constant_result` sets. As a decorator it would import torch's compiler, a second and more,
# with every command.
_flash_enabled._dynamo_marked_constant = True  # type: ignore[attr-defined]
