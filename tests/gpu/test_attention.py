"""Attention with its log-sum-exp rows on a GPU: the flash kernel's output, and rows that are right."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from optima_core import attention
from optima_core.attention import attention_with_lse


@pytest.mark.parametrize(("queries", "keys", "causal"), [(77, 77, True), (197, 197, False), (40, 256, False)])
def test_rows_and_output_are_right(queries: int, keys: int, causal: bool, device: torch.device, seed: int) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("torch's flash kernel needs compute capability 8.0")
    tensors = [
        torch.randn(3, 4, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for n in (queries, keys, keys)
    ]
    output, lse = attention_with_lse(*tensors, causal=causal)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        expected = F.scaled_dot_product_attention(*tensors, is_causal=causal)
    if attention.flash_attn_func is None:
        assert torch.equal(output, expected)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    weight = torch.randn_like(output)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), tensors) for x in (output, expected))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    scores = tensors[0].double() @ tensors[1].double().transpose(2, 3) / 8
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    assert lse is not None
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-3)


def test_there_are_no_rows_with_a_mask_or_in_fp32(device: torch.device) -> None:
    q = torch.randn(2, 4, 16, 64, device=device)
    assert attention_with_lse(q, q, q)[1] is None
    mask = torch.ones(16, 16, dtype=torch.bool, device=device)
    half = q.bfloat16()
    assert attention_with_lse(half, half, half, mask=mask)[1] is None
