"""Whether the Triton kernels compute what they should on this very GPU, asked before a loss first uses them.

Kernels are proven in this project by an interpreter and by compilers; the first GPU that runs them may be a user's. So
before a loss first takes the triton backend by default, its kernels solve a small random problem, forward and backward,
in float32 and in bfloat16, and are compared with the reference in float64 on the CPU. That costs some seconds of
compiling, once: the outcome is kept in the user's cache directory under the GPU's model, the versions of torch and
triton, and a digest of this package's code. A loss whose kernels do not compile, or compute something else, warns once
and runs on the blocked backend.
"""

import functools
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Largest relative RMS error of a loss or gradient, above rounding (bfloat16 keeps 8 bits), far below a wrong kernel's.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}

# Of the layers of a problem: the closed one is between open ones, so that what it writes into its neighbours shows.
GATES = (1.0, 0.0, 0.5)


@dataclass(frozen=True)
class Outcome:
    """What checking a loss found.

    `error` is the largest relative RMS error of the loss and its gradients, None if the kernels did not run; `detail`
    says what is wrong, and is empty if nothing is.
    """

    loss: str
    device: str
    torch: str
    triton: str
    passed: bool
    error: float | None
    detail: str


class Problem(NamedTuple):
    """One call of a loss: its arguments, tensors and lists of those among them, and which of them get gradients."""

    arguments: dict[str, Any]
    trained: tuple[str, ...]


def is_trusted(loss: str, device: torch.device) -> bool:
    """Whether the Triton kernels of `loss`, a key of `PROBLEMS`, may be used on `device`; warns once if not.

    While a CUDA graph is being captured nothing can be checked, and what was not checked before is trusted.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    return _is_trusted(loss, _name(device), device)


@functools.cache
def _is_trusted(loss: str, name: str, device: torch.device) -> bool:
    file = _cache_file(loss, name)
    outcome = _read(file) or check_anew(loss, device)
    if not outcome.passed:
        warnings.warn(
            f"{loss} falls back to the slower blocked backend: its Triton kernels failed their check on {name} with "
            f"torch {outcome.torch} and triton {outcome.triton}: {outcome.detail}. To check again, delete {file}",
            RuntimeWarning,
            stacklevel=2,
        )
    return outcome.passed


def check_anew(loss: str, device: torch.device) -> Outcome:
    """`check`, and keeps the outcome for `is_trusted` in processes to come."""
    outcome = check(loss, device)
    _write(_cache_file(loss, outcome.device), outcome)
    return outcome


def check(loss: str, device: torch.device) -> Outcome:
    """Runs the Triton kernels of `loss`, a key of `PROBLEMS`, on `device` and compares with the reference.

    Raises:
        torch.OutOfMemoryError: the device's memory is taken, which says nothing about the kernels.
    """
    found = functools.partial(Outcome, loss, _name(device), torch.__version__, _triton_version())
    largest = 0.0
    try:
        for dtype, tolerance in TOLERANCES.items():
            errors = _in_clean_thread(functools.partial(_errors, loss, PROBLEMS[loss](dtype), device), device)
            for what, error in errors.items():
                if not error <= tolerance:
                    place = f"{what} in {str(dtype).removeprefix('torch.')}"
                    return found(False, error, f"{place} has a relative error of {error:.1e}, above {tolerance:.0e}")
                largest = max(largest, error)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # compilers and drivers fail in ways of their own
        return found(False, None, f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}")
    return found(True, largest, "")


def attention_problem(dtype: torch.dtype) -> Problem:
    """Layers of 80 queries and keys, so that the last tiles are not full; causal, or of one sample keys are padding."""
    draw = _draw(dtype)
    arguments: dict[str, Any] = {name: [draw(2, 1, 80, 64) for _ in GATES] for name in ("q_s", "k_s", "q_t", "k_t")}
    arguments |= {"gate": torch.tensor(GATES), "sample_weight": torch.tensor([1.0, 2.0])}
    if dtype == torch.float32:
        arguments |= {"kind": "mse", "causal": True}
    else:
        arguments |= {"kind": "kl", "key_lengths": torch.tensor([80, 33])}
    return Problem(arguments, ("q_s", "k_s"))


def hidden_problem(dtype: torch.dtype) -> Problem:
    """Layers of 75 tokens, projected from 48 to 160 features; some tokens are padding."""
    draw = _draw(dtype)
    arguments = {
        "h_s": [draw(3, 25, 48) for _ in GATES],
        "h_t": [draw(3, 25, 160) for _ in GATES],
        "weight": [draw(160, 48) * 48**-0.5 for _ in GATES],
        "bias": [draw(160) for _ in GATES],
        "normalize": "layernorm" if dtype == torch.float32 else None,
        "mask": torch.arange(25) < torch.tensor([[25], [7], [16]]),
        "gate": torch.tensor(GATES),
    }
    return Problem(arguments, ("h_s", "weight", "bias"))


def logits_problem(dtype: torch.dtype) -> Problem:
    """70 tokens, a vocabulary of 200; in float32 Jensen-Shannon with cross entropy, in bfloat16 forward KL."""
    draw = _draw(dtype)
    arguments: dict[str, Any] = {
        "h_s": draw(70, 48),
        "w_s": draw(200, 48) * 48**-0.5,
        "bias_s": draw(200),
        "h_t": draw(70, 64),
        "w_t": draw(200, 64) * 64**-0.5,
        "bias_t": draw(200),
        "temperature": 2.0,
        "mask": torch.arange(70) % 9 != 0,
        "gate": torch.tensor(0.5),
    }
    if dtype == torch.float32:
        labels = torch.arange(70) * 2
        labels[::5] = -100
        arguments |= {"divergence": "jsd", "labels": labels}
    return Problem(arguments, ("h_s", "w_s", "bias_s"))


PROBLEMS: dict[str, Callable[[torch.dtype], Problem]] = {
    "attention_map_losses": attention_problem,
    "hidden_mses": hidden_problem,
    "linear_kl": logits_problem,
}


def _draw(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Normal numbers, always the same, without a touch to the random state of torch."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype)


def _errors(loss: str, problem: Problem, device: torch.device) -> dict[str, float]:
    """Relative RMS errors of the loss and its gradients, by what they are of; NaN where a value is not finite."""
    actual = _solve(loss, problem, "triton", device)
    exact = Problem(_converted(problem.arguments, torch.device("cpu"), torch.float64), problem.trained)
    expected = _solve(loss, exact, "reference", torch.device("cpu"))
    return {what: float(_rms(actual[what].double().cpu() - x) / _rms(x)) for what, x in expected.items()}


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _solve(loss: str, problem: Problem, backend: str, device: torch.device) -> dict[str, Tensor]:
    """The losses, and the gradients of a sum of them, flat."""
    import optima_kernels

    arguments = _converted(problem.arguments, device)
    trained = {name: _tensors(arguments[name]) for name in problem.trained}
    for tensors in trained.values():
        for tensor in tensors:
            tensor.requires_grad_()
    losses = torch.cat([x.reshape(-1) for x in _tensors(getattr(optima_kernels, loss)(**arguments, backend=backend))])
    # Different factors, so that a gradient in a wrong place shows.
    (losses * torch.arange(1, len(losses) + 1, device=device)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {f"the gradient of {name}": [x.grad for x in tensors] for name, tensors in trained.items()}
    return {"the loss": losses.detach()} | {
        name: torch.cat([x.flatten() for x in xs if x is not None]) for name, xs in gradients.items()
    }


def _tensors(x: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [x] if isinstance(x, Tensor) else x


def _converted(x: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A copy of tensors, of those in lists and dictionaries too: floating-point ones in `dtype`, if given."""
    if isinstance(x, Tensor):
        return x.to(device, dtype if x.is_floating_point() else None, copy=True)
    if isinstance(x, list):
        return [_converted(y, device, dtype) for y in x]
    if isinstance(x, Mapping):
        return {name: _converted(y, device, dtype) for name, y in x.items()}
    return x


def _in_clean_thread(function: Callable[[], dict[str, float]], device: torch.device) -> dict[str, float]:
    """`function()` without the caller's autocast, no_grad, inference mode, fake tensors, transforms or compilation.

    torch keeps all of those for each thread; only the ban of synchronisation is everybody's, and lifted meanwhile.
    """
    results: list[dict[str, float]] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            with torch.cuda.device(device if device.type == "cuda" else -1):
                results.append(function())
        except Exception as failure:
            failures.append(failure)

    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    ban = torch.cuda.get_sync_debug_mode() if initialized else 0
    if initialized:
        torch.cuda.set_sync_debug_mode(0)
    try:
        thread = threading.Thread(target=run, name="optima_kernels.shared.selfcheck")
        thread.start()
        thread.join()
    finally:
        if initialized:
            torch.cuda.set_sync_debug_mode(ban)
    if failures:
        raise failures[0]
    return results[0]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _cache_file(loss: str, name: str) -> Path:
    """One file a loss, so that processes that check different ones do not meet."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    key = "\n".join((name, torch.__version__, _triton_version(), code.hexdigest()))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "optima_kernels" / "selfcheck" / f"{loss}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> Outcome | None:
    try:
        return Outcome(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, outcome: Outcome) -> None:
    """At once or not at all; where the directory cannot be written, the next process checks again."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
        scratch.replace(file)
