"""Products by oneDNN: equal to float64 ones for any strides, and to torch's linear layer, gradients included."""

from collections.abc import Iterator

import pytest
import torch
from attention_problems import Case, cases, check
from hypothesis import given
from kernel_support import assert_close
from torch import Tensor

from optima_kernels.shared import cpu_products
from optima_kernels.shared.cpu_products import add_product, linear, product

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not cpu_products.is_faster(2**30, torch.empty(0)),
    reason="torch's own products are as fast here: no oneDNN, or no AVX-512",
)


@pytest.fixture(autouse=True, scope="module")
def _any_size() -> Iterator[None]:
    """Small products, too, go through oneDNN."""
    least, cpu_products.LEAST_FLOPS = cpu_products.LEAST_FLOPS, 0
    yield
    cpu_products.LEAST_FLOPS = least


def layouts(x: Tensor) -> list[Tensor]:
    """The same matrix, its rows, its columns, or nothing dense."""
    with_gaps = torch.full((x.shape[0], 2 * x.shape[1]), torch.nan)
    with_gaps[:, ::2] = x
    wide = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)
    return [x, x.t().contiguous().t(), with_gaps[:, ::2], wide[:, : x.shape[1]]]


def test_products_of_any_strides(seed: int) -> None:
    for rows, inner, columns in ((1, 1, 1), (7, 5, 3), (64, 33, 70)):
        a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(rows, columns)
        expected = a.double() @ b.double()
        for left in layouts(a):
            for right in layouts(b):
                assert_close(product(left, right), expected, 1e-6, "product", floor=1e-6)
                assert_close(add_product(out.clone(), left, right), out + expected, 1e-6, "sum", floor=1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_and_its_gradients_are_torchs(with_bias: bool, seed: int) -> None:
    for shape in ((9, 6), (2, 5, 6), (2, 3, 4, 6)):
        x = torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        weight, bias = torch.randn(8, 6, requires_grad=True), torch.randn(8, requires_grad=True)
        given = (x, weight, bias) if with_bias else (x, weight)
        incoming = torch.randn(*shape[:-1], 8)
        actual = linear(*given)
        expected = torch.nn.functional.linear(*(v.double() for v in given))
        assert_close(actual, expected, 1e-6, "output")
        gradients = torch.autograd.grad(actual, given, incoming)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, given, incoming.double()), strict=True):
            assert_close(ours, theirs, 1e-6, "gradient")


def test_linear_leaves_autocast_and_other_dtypes_to_torch(seed: int) -> None:
    x, weight = torch.randn(4, 6), torch.randn(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert torch.equal(linear(x.double(), weight.double()), x.double() @ weight.double().t())


def test_only_what_wants_a_gradient_gets_one(seed: int) -> None:
    x, weight = torch.randn(4, 6), torch.randn(8, 6, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert_close(weight.grad, x.double().sum(0).expand(8, 6), 1e-6, "gradient")


@given(case=cases((torch.float32,), widths=(1, 7, 16, 24), most_tokens=40))
def test_attention_maps_compared_by_such_products(case: Case) -> None:
    check(case, "blocked", CPU)
