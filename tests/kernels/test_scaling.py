"""Saved gradients times what autograd hands back."""

from typing import Any

import pytest
import torch
from kernel_support import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from optima_kernels.shared.registration import multiply

pytest.importorskip("triton")
from optima_kernels.shared.scaling import scale_into

DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", DTYPES)
def test_parts_have_factors_of_their_own_and_0_ends_anything(
    dtype: torch.dtype, to: torch.dtype, device: torch.device, seed: int
) -> None:
    saved = [torch.randn(3, 5, 1001, device=device).to(dtype) for _ in range(2)]
    factors = torch.rand(2, 3, device=device)
    factors[1, 2] = 0.0
    expected = [x.double() * f.double()[:, None, None] * 0.5 for x, f in zip(saved, factors, strict=True)]
    saved[1][2] = float("nan")
    out = [torch.full_like(x, float("nan"), dtype=to) for x in saved]
    scale_into(out, saved, factors, 0.5)
    for actual, exact in zip(out, expected, strict=True):
        assert_close(actual, exact, 1e-6 if to == torch.float32 else 4e-4, f"seed {seed}")


def test_in_place_and_by_expanded_factors(device: torch.device, seed: int) -> None:
    saved = [torch.randn(7, 3, device=device) for _ in range(3)]
    expected = [x * 2.0 for x in saved]
    scale_into(saved, saved, torch.full((), 2.0, device=device).expand(3))
    assert all(torch.equal(x, e) for x, e in zip(saved, expected, strict=True)), f"seed {seed}"


class Products(TorchDispatchMode):
    """Keeps the dimensions of the factors of torch's products."""

    def __init__(self) -> None:
        super().__init__()
        self.dimensions: list[list[int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten.mul:
            self.dimensions.append([x.dim() for x in arguments[:2]])
        return function(*arguments, **named or {})


@pytest.mark.parametrize("in_graph", [False, True])
def test_torch_never_gets_a_factor_that_it_would_round_to_the_gradients_dtype(in_graph: bool, seed: int) -> None:
    """As it does on a GPU with one without dimensions, and on no CPU."""
    saved, factor = torch.randn(5, 3).bfloat16(), torch.tensor(1 + 2**-10)
    exact = saved.double() * factor.double()
    products = Products()
    with products:
        actual = multiply(saved.clone(), factor, in_graph, torch.float32)
    assert_close(actual, exact, 1e-6, f"seed {seed}")
    assert products.dimensions == [[2, 1]]
