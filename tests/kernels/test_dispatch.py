"""Which backend a loss gets, and what is said where there can be none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from optima_kernels import attention_map_loss, hidden_mse, linear_kl
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


def trained(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


LOSSES: dict[str, Callable[[], Any]] = {
    "attention": lambda: attention_map_loss(*[trained(1, 2, 5, 16) for _ in range(4)], backend="triton"),
    "means over heads": lambda: attention_map_loss(
        *[trained(1, 2, 5, 16) for _ in range(4)], heads="mean", backend="triton"
    ),
    "hidden": lambda: hidden_mse(
        trained(5, 8), trained(5, 12), trained(12, 8), trained(12), gate=torch.ones(()), backend="triton"
    ),
    "vocabulary": lambda: linear_kl(
        trained(5, 8), trained(19, 8), trained(5, 12), trained(19, 12), gate=torch.ones(()), backend="triton"
    ),
}


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="launches are watched in Triton's interpreter")
@pytest.mark.parametrize("loss", LOSSES)
def test_kernels_are_launched_while_their_tensors_device_is_the_current_one(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, whichever the tensors lie on."""
    from triton.runtime.interpreter import GridExecutor

    guarded: list[Tensor] = []
    launched: list[bool] = []
    launch = GridExecutor.__call__

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        guarded.append(tensor)
        yield
        guarded.pop()

    def run(executor: Any, *arguments: Any, **named: Any) -> Any:
        launched.append(bool(guarded))
        return launch(executor, *arguments, **named)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", run)
    LOSSES[loss]().backward()
    assert len(launched) > 2
    assert all(launched)


def test_a_cpu_gets_blocked() -> None:
    assert dispatch.choose_backend(None, torch.zeros(1), "hidden_mses") == "blocked"


def test_an_unknown_backend_is_named() -> None:
    h = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="backend must be one of reference, blocked, triton or None, not 'cuda'"):
        hidden_mse(h, h, backend="cuda")
