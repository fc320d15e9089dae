"""Attention with its log-sum-exp rows: the bits of torch's own call, and rows that are right."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from optima_core import attention
from optima_core.attention import attention_with_lse
from optima_core.precision import arithmetic
from optima_kernels import attention_map_loss

CASES = {
    "plain": (9, 9, None, False),
    "causal": (33, 33, None, True),
    "cross": (5, 70, None, False),
    "mask_of_pairs": (6, 11, (3, 1, 6, 11), False),
    "mask_of_keys": (6, 11, (3, 1, 1, 11), False),
    "mask_for_all": (7, 7, (7, 7), False),
}


def inputs(case: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor | None, bool]:
    queries, keys, mask_shape, causal = CASES[case]
    # As a model has them: heads are views of one projection.
    q, k, v = (torch.randn(3, n, 4, 10, dtype=dtype).transpose(1, 2) for n in (queries, keys, keys))
    mask = None
    if mask_shape is not None:
        mask = torch.rand(mask_shape) < 0.6
        mask[..., 0] = True
    return [x.requires_grad_() for x in (q, k, v)], mask, causal


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_torchs_call(case: str, seed: int) -> None:
    tensors, mask, causal = inputs(case)
    output, lse = attention_with_lse(*tensors, mask=mask, causal=causal)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=causal)
    assert torch.equal(output, expected)
    assert lse is not None
    assert not lse.requires_grad
    weight = torch.randn_like(output)
    ours = torch.autograd.grad((output * weight).sum(), tensors)
    theirs = torch.autograd.grad((expected * weight).sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_rows_are_log_sum_exps_of_the_scaled_masked_scores(case: str, seed: int) -> None:
    (q, k, v), mask, causal = inputs(case)
    _, lse = attention_with_lse(q, k, v, mask=mask, causal=causal)
    scores = q.double() @ k.double().transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    assert lse is not None
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)


def test_there_are_no_rows_where_torch_does_not_take_the_flash_kernel(seed: int) -> None:
    tensors, _, _ = inputs("plain")
    with arithmetic("bf16", torch.device("cpu")):
        assert attention_with_lse(*tensors)[1] is None


@pytest.mark.parametrize("case", ["plain", "causal"])
def test_flash_attn_is_taken_on_cuda_where_it_is_installed(
    case: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, deterministic: bool, return_attn_probs: bool
    ) -> tuple[Tensor, Tensor, None]:
        """The package's signature and layout, [B, N, H, d], as far as they are used."""
        assert deterministic
        assert return_attn_probs
        monkeypatch.setattr(attention, "_flash_enabled", lambda device: device == "cpu")
        output, lse = attention_with_lse(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
        assert lse is not None
        return output.transpose(1, 2), lse, None

    tensors, mask, causal = inputs(case)
    expected = attention_with_lse(*tensors, mask=mask, causal=causal)
    monkeypatch.setattr(attention, "flash_attn_func", flash_attn_func)
    monkeypatch.setattr(attention, "_flash_enabled", lambda device: False)
    monkeypatch.setattr(attention, "_flash_on_cuda", lambda *_: True)
    output, lse = attention_with_lse(*tensors, mask=mask, causal=causal)
    assert torch.equal(output, expected[0])
    assert torch.equal(lse, expected[1])  # type: ignore[arg-type]


def test_both_ways_are_one_graph(seed: int) -> None:
    for case in ("causal", "mask_of_keys"):
        tensors, mask, causal = inputs(case)
        torch.compiler.reset()
        compiled = torch.compile(attention_with_lse, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(*tensors, mask=mask, causal=causal), attention_with_lse(*tensors, mask=mask, causal=causal)
        )


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_attention_loss_is_the_same_with_and_without_the_rows(kind: str, seed: int) -> None:
    (q_s, k_s, v_s), mask, _ = inputs("mask_of_pairs")
    (q_t, k_t, v_t), *_ = inputs("mask_of_pairs")
    rows = [attention_with_lse(*side, mask=mask)[1] for side in ((q_s, k_s, v_s), (q_t, k_t, v_t))]
    plain = attention_map_loss(q_s, k_s, q_t, k_t, kind=kind, mask=mask)
    helped = attention_map_loss(q_s, k_s, q_t, k_t, kind=kind, mask=mask, lse_s=rows[0], lse_t=rows[1])
    torch.testing.assert_close(helped, plain, rtol=1e-4, atol=1e-6)
    gradients = (torch.autograd.grad(loss, (q_s, k_s)) for loss in (helped, plain))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
