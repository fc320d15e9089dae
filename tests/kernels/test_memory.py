"""Memory at the peak, counted on tensors that lie nowhere, and what `linear_kl` takes of eager torch's on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optima_kernels.inspect.memory import peak_bytes

pytest.importorskip("triton")
from optima_kernels.logits.problem import Layer, Options, Solution
from optima_kernels.logits.triton import PADDING, _bytes_a_logit, chunk_tokens

KIB = 256  # floats of a KiB


def test_what_lives_at_a_time_is_counted_and_what_died_is_not() -> None:
    x = torch.empty(KIB, device="meta")

    def call() -> Tensor:
        first = x + 1  # 1
        second = first.view(2, -1) * 2  # 2: a view takes nothing
        del first
        second.add_(1)
        third = torch.cat([second, second])  # 3, and second
        del second
        return third + 0  # 4: third and the sum

    assert peak_bytes(call) == 4 * 1024
    assert peak_bytes(lambda: x.mul_(2)) == 0


def test_gradients_count_and_what_autograd_saves() -> None:
    x = torch.empty(KIB, device="meta", requires_grad=True)
    assert peak_bytes(lambda: torch.autograd.grad(x.sin().sum(), x)) >= 2 * 1024


@pytest.mark.parametrize(
    ("tokens", "words", "widths"),
    [
        (2048, 49408, (768, 1024)),
        (4096, 50257, (1024, 1024)),
        (8192, 128256, (2048, 4096)),
        (8192, 128256, (4096, 2048)),
        (2048, 16384, (768, 768)),
    ],
)
def test_linear_kl_takes_a_tenth_of_eager_torch(tokens: int, words: int, widths: tuple[int, int]) -> None:
    """Its gradients, the student's logits of a chunk of tokens, and the teacher's of a part of it."""

    def side(width: int, trained: bool) -> tuple[Tensor, Tensor]:
        shapes = (tokens, width), (words, width)
        h, w = (torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=trained) for s in shapes)
        return h, w

    (h_s, w_s), (h_t, w_t) = side(widths[0], True), side(widths[1], False)

    def eager() -> tuple[Tensor, ...]:
        log_t, log_s = ((h @ w.t()).float().log_softmax(-1) for h, w in ((h_t, w_t), (h_s, w_s)))
        return torch.autograd.grad(F.kl_div(log_s, log_t, log_target=True, reduction="batchmean"), (h_s, w_s))

    layer = Layer(h_s, w_s, None, h_t, w_t, None, None, None, None)
    options = Options(1.0, "forward", 0.5, 0.0, (True, True, False), torch.bfloat16)
    columns = -(-words // PADDING) * PADDING
    scratch = sum(
        columns * size * count
        for size, count in zip(_bytes_a_logit(layer, options), chunk_tokens(layer, options, columns), strict=True)
    )
    assert Solution.bytes_of(layer, options) + scratch <= 0.1 * peak_bytes(eager)
