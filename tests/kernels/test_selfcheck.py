"""The check before the first use on a GPU: it passes what is right, catches what is wrong, and asks once."""

import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optima.commands.doctor import doctor
from optima.commands.options import DoctorConfig
from optima_kernels.shared import selfcheck
from optima_kernels.shared.dispatch import INTERPRETED, choose_backend

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from optima_kernels.attention import triton as attention_kernels  # noqa: E402
from optima_kernels.hidden import triton as hidden_kernels  # noqa: E402
from optima_kernels.logits import triton as logits_kernels  # noqa: E402
from optima_kernels.shared import products  # noqa: E402

interpreted = pytest.mark.skipif(not INTERPRETED, reason="a kernel is broken by replacing it in the interpreter")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is known yet, on disk or in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    selfcheck._is_trusted.cache_clear()
    yield tmp_path
    selfcheck._is_trusted.cache_clear()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that take no time, for tests of what happens around a check."""

    def hidden(dtype: torch.dtype) -> selfcheck.Problem:
        h_s, h_t = torch.randn(2, 3, 8, dtype=dtype)
        return selfcheck.Problem({"h_s": [h_s], "h_t": [h_t]}, ("h_s",))

    def attention(dtype: torch.dtype) -> selfcheck.Problem:
        names = ("q_s", "k_s", "q_t", "k_t")
        return selfcheck.Problem({name: [torch.randn(1, 1, 4, 16, dtype=dtype)] for name in names}, names[:2])

    monkeypatch.setattr(selfcheck, "PROBLEMS", {"hidden_mses": hidden, "attention_map_losses": attention})


def unnamed_backend(loss: str, device: torch.device) -> str:
    """What a loss runs on when the caller names no backend and its tensors lie on a GPU."""
    tensor: Any = SimpleNamespace(is_cuda=True, device=device)
    return choose_backend(None, tensor, loss)


@triton.jit
def wrong_score_gradient(b_p_s, b_p_t, b_row_term, MSE: tl.constexpr):
    return b_p_s - 0.8 * b_p_t


@triton.jit
def pointer_of_the_first_layer(pointers, i_l, LAYERS: tl.constexpr):
    return pointers[0]


def scaled(kernel: Any, argument: str) -> Any:
    """`kernel`, except that a number it is given is 10 % too large."""

    class Scaled:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda **arguments: kernel[grid](**arguments | {argument: arguments[argument] * 1.1})

    return Scaled()


def uncompilable(kernel: Any) -> Any:
    """`kernel` on a GPU that it does not fit."""

    class Uncompilable:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            raise triton.runtime.errors.OutOfResources(264192, 232448, "shared memory")

    return Uncompilable()


BROKEN = [
    (
        "attention_map_losses",
        attention_kernels,
        "_score_gradient",
        lambda _: wrong_score_gradient,
        "the gradient of",
    ),
    ("attention_map_losses", attention_kernels, "lse_kernel", functools.partial(scaled, argument="scale"), "the loss"),
    ("hidden_mses", products, "of_layer", lambda _: pointer_of_the_first_layer, "the gradient of"),
    ("linear_kl", logits_kernels, "lse_kernel", functools.partial(scaled, argument="inverse_temperature"), "the loss"),
    ("linear_kl", logits_kernels, "divergence_kernel", uncompilable, "OutOfResources: out of resource: shared memory"),
]


@pytest.mark.parametrize("loss", selfcheck.PROBLEMS)
def test_kernels_as_they_are_pass(loss: str, device: torch.device) -> None:
    outcome = selfcheck.check(loss, device)
    assert outcome.passed, outcome
    assert outcome.error is not None
    assert outcome.error > 0


@interpreted
@pytest.mark.parametrize(("loss", "family", "name", "broken", "words"), BROKEN)
def test_a_kernel_broken_on_purpose_warns_once_and_falls_back_to_blocked(
    loss: str,
    family: Any,
    name: str,
    broken: Callable[[Any], Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    monkeypatch.setattr(family, name, broken(getattr(family, name)))
    with pytest.warns(RuntimeWarning) as caught:
        assert unnamed_backend(loss, device) == "blocked"
    messages = [str(warning.message) for warning in caught if "falls back" in str(warning.message)]
    assert len(messages) == 1
    assert loss in messages[0]
    assert words in messages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unnamed_backend(loss, device) == "blocked"


@pytest.mark.usefixtures("tiny")
def test_a_loss_is_checked_once_for_all_processes(
    cache: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    loss = "hidden_mses"
    assert unnamed_backend(loss, device) == "triton"
    selfcheck._is_trusted.cache_clear()  # as a new process would start
    monkeypatch.setitem(selfcheck.PROBLEMS, loss, lambda dtype: pytest.fail("checked again"))
    assert unnamed_backend(loss, device) == "triton"
    (file,) = cache.rglob("*.json")
    kept = json.loads(file.read_text())
    assert (kept["loss"], kept["torch"], kept["triton"]) == (loss, torch.__version__, triton.__version__)


@pytest.mark.parametrize("changed", ["gpu", "torch", "triton", "code"])
def test_another_gpu_version_or_code_is_checked_anew(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    checked = []

    def check(loss: str, device: torch.device) -> selfcheck.Outcome:
        checked.append(loss)
        return selfcheck.Outcome(loss, selfcheck._name(device), torch.__version__, triton.__version__, True, 0.0, "")

    monkeypatch.setattr(selfcheck, "check", check)
    for _ in range(2):
        assert selfcheck.is_trusted("linear_kl", device)
    assert len(checked) == 1
    selfcheck._is_trusted.cache_clear()
    if changed == "gpu":
        monkeypatch.setattr(selfcheck, "_name", lambda device: "Another GPU")
    elif changed == "code":
        (tmp_path / "changed.py").write_text("")
        monkeypatch.setattr(selfcheck, "__file__", str(tmp_path / "selfcheck.py"))
    else:
        monkeypatch.setattr({"torch": torch, "triton": triton}[changed], "__version__", "99.0")
    assert selfcheck.is_trusted("linear_kl", device)
    assert len(checked) == 2


@pytest.mark.usefixtures("tiny")
def test_the_callers_modes_do_not_reach_the_check(device: torch.device) -> None:
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        assert unnamed_backend("hidden_mses", device) == "triton"


@pytest.mark.usefixtures("tiny")
def test_a_choice_inside_a_compiled_graph_is_checked(cache: Path, device: torch.device) -> None:
    tensor: Any = SimpleNamespace(is_cuda=True, device=device)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if choose_backend(None, tensor, "hidden_mses") == "triton" else x

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert compiled(torch.zeros((), device=device)).item() == 1
    assert len(list(cache.rglob("*.json"))) == 1


@pytest.mark.usefixtures("tiny")
def test_a_directory_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert unnamed_backend("hidden_mses", device) == "triton"


@interpreted
@pytest.mark.usefixtures("tiny")
def test_doctor_prints_every_outcome(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hidden_kernels, "row_kernel", uncompilable(None))
    monkeypatch.setenv("COLUMNS", "250")
    doctor(DoctorConfig(check=True))
    lines = capsys.readouterr().out.splitlines()
    for loss, verdict in (("attention_map_losses", "right"), ("hidden_mses", "wrong")):
        assert [verdict in line for line in lines if line.startswith(loss)] == [True]
