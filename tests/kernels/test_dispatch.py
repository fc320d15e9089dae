"""Which backend a loss gets, and what is said where there can be none."""

import pytest
import torch

from optima_kernels import hidden_mse
from optima_kernels.shared import dispatch

triton = pytest.importorskip("triton")
import numpy  # noqa: E402


@pytest.fixture(autouse=True)
def afresh() -> None:
    dispatch.check_interpreter.cache_clear()


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="about Triton's interpreter")
@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "fits"),
    [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.5.2", True), ("3.6.0", "1.26.4", True)],
)
def test_an_interpreter_that_the_installed_numpy_breaks_is_named(
    of_triton: str, of_numpy: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(numpy, "__version__", of_numpy)
    tensor = torch.zeros(1)
    if fits:
        assert dispatch.choose_backend("triton", tensor, "hidden_mses") == "triton"
    else:
        with pytest.raises(RuntimeError, match=r"triton 3.6.0 needs numpy below 2.4, not 2.4.0: pip install"):
            dispatch.choose_backend("triton", tensor, "hidden_mses")
    dispatch.check_interpreter.cache_clear()


def test_a_cpu_gets_blocked() -> None:
    assert dispatch.choose_backend(None, torch.zeros(1), "hidden_mses") == "blocked"


def test_an_unknown_backend_is_named() -> None:
    h = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="backend must be one of reference, blocked, triton or None, not 'cuda'"):
        hidden_mse(h, h, backend="cuda")
