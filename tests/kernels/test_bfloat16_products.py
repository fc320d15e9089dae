"""Products of bfloat16 on a CPU: losses by them are as near the float64 oracle as bfloat16 lets them be."""

import pytest
import test_hidden
import test_logits
import torch
from kernel_support import assert_agree, assert_close
from torch import Tensor

from optima_kernels.shared import cpu_products

BFLOAT16 = torch.bfloat16


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """As on a CPU that multiplies bfloat16, products of any size; what was answered to who asked."""
    answers: list[bool] = []
    asked = cpu_products.in_bfloat16

    def spy(multiply_adds: int, *tensors: Tensor) -> bool:
        answers.append(asked(multiply_adds, *tensors))
        return answers[-1]

    monkeypatch.setattr(cpu_products, "LEAST_FLOPS", 0)
    monkeypatch.setattr(cpu_products, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_products, "in_bfloat16", spy)
    monkeypatch.setattr("optima_kernels.hidden.blocked.in_bfloat16", spy)
    return answers


@pytest.mark.parametrize("normalize", [None, "layernorm", "l2"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states(
    normalize: str | None, biased: bool, masked: bool, seed: int, made: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optima_kernels.hidden.blocked.TILE_ELEMENTS", 24 * 17)  # several tiles
    problem = test_hidden.Problem(
        (2, 20), 24, 17, biased=biased, normalize=normalize, masked=masked, weighted=masked, dtype=BFLOAT16
    )
    actual, exact = problem.solve("blocked"), problem.solve("oracle")
    assert made == [True]
    tolerance = test_logits.TOLERANCE[BFLOAT16]
    assert_agree(actual, exact, tolerance, lambda: problem.solve("oracle"), BFLOAT16, f"seed {seed}")


@pytest.mark.parametrize("divergence", test_logits.DIVERGENCES)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_kl(
    divergence: str, labelled: bool, masked: bool, seed: int, made: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss itself is of float32 products, and as exact."""
    monkeypatch.setattr("optima_kernels.logits.blocked.SLICE_WORDS", 50)
    monkeypatch.setattr("optima_kernels.logits.blocked.BLOCK_ELEMENTS", 0)
    monkeypatch.setattr("optima_kernels.logits.blocked.BLOCK_TOKENS", 7)
    problem = test_logits.Problem(
        20, 170, 24, 17, biased=True, labelled=labelled, masked=masked, dtype=BFLOAT16, divergence=divergence
    )
    actual, exact = problem.solve("blocked"), problem.solve("oracle")
    assert made
    assert all(made)
    tolerance = test_logits.TOLERANCE[BFLOAT16]
    assert_agree(actual, exact, tolerance, lambda: problem.solve("oracle"), BFLOAT16, f"seed {seed}")
    for name in set(actual) - set(test_logits.LEAVES):
        assert_close(actual[name].float(), exact[name], 1e-5, f"{name}, seed {seed}")


def test_under_autocast_gradients_keep_the_dtype_of_their_weights(seed: int, made: list[bool]) -> None:
    problem = test_hidden.Problem((2, 20), 24, 17)
    with torch.autocast("cpu", BFLOAT16):
        actual = problem.solve("blocked")
    assert made == [True]
    assert {x.dtype for x in actual.values()} == {torch.float32}
    assert_agree(actual, problem.solve("oracle"), 2e-2, lambda: problem.solve("oracle"), BFLOAT16, f"seed {seed}")


def test_who_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_multiplies_bfloat16", lambda: True)
    narrow, wide, large = torch.empty(2, dtype=BFLOAT16), torch.empty(2), cpu_products.LEAST_FLOPS // 2
    assert cpu_products.in_bfloat16(large, narrow, narrow)
    assert not cpu_products.in_bfloat16(large - 1, narrow, narrow)
    assert not cpu_products.in_bfloat16(large, narrow, wide)
    assert not cpu_products.in_bfloat16(large, narrow.to("meta"))
    monkeypatch.setattr(cpu_products, "_multiplies_bfloat16", lambda: False)
    assert not cpu_products.in_bfloat16(large, narrow, narrow)
