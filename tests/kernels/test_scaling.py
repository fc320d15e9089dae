"""Saved gradients times what autograd hands back."""

from typing import Any

import pytest
import torch
from kernel_support import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from optima_kernels.shared.registration import multiply

pytest.importorskip("triton")
from optima_kernels.inspect.counts import counting
from optima_kernels.shared.dispatch import INTERPRETED
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


@pytest.mark.skipif(not INTERPRETED, reason="counts in Triton's interpreter")
def test_a_factor_of_1_moves_nothing_in_place(seed: int) -> None:
    saved = [torch.randn(2, 1001) for _ in range(2)]
    expected = [x.clone() for x in saved]
    with counting() as launches:
        scale_into(saved, saved, torch.ones(2, 2))
        scale_into(saved, saved, torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
    expected[1][1] *= 2.0
    assert all(torch.equal(x, e) for x, e in zip(saved, expected, strict=True)), f"seed {seed}"
    assert [launch.stored.total() for launch in launches] == [0, 4 * 1001]


def test_a_factor_of_1_leaves_a_gradient_on_a_cpu_as_it_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: False)  # as in a last pass
    saved = torch.randn(5, 3)
    assert multiply(saved, torch.tensor(1.0), in_graph=False) is saved
    expected = saved * 1.5
    assert torch.equal(multiply(saved, torch.tensor(1.5), in_graph=False), expected), f"seed {seed}"


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
