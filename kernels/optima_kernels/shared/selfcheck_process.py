"""The process that checks kernels for another one, and how it is asked.

It reads a request a line from its standard input and answers with a line on its standard output, until the input ends
or nothing was asked for a while: a GPU's memory is not to be held for nothing. What CUDA, a compiler or a signal does
to it, it does to it alone; the next request then starts another one.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from optima_kernels.shared.variants import Problem, problem_of

# Largest relative RMS error of a loss or gradient, above rounding (bfloat16 keeps 8 bits), far below a wrong kernel's.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# How often the same bits must come again, in memory that holds NaN before.
REPETITIONS = 8
MARK = "answer: "  # before an answer; compilers may print, too
IDLE_SECONDS = 20.0
ANSWER_SECONDS = 180.0
# Modules of the current folder take no part (-P).
COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "optima_kernels.shared.selfcheck_process")


@dataclass(frozen=True)
class Answer:
    """As `selfcheck.Outcome`."""

    verdict: Literal["right", "wrong", "unusable", "unknown"]
    error: float | None = None
    detail: str = ""


def check(loss: str, variant: str, device: torch.device) -> Answer:
    """Solves the variant's problem with the Triton kernels in this process and compares with the reference."""
    problem = problem_of(loss, variant)
    try:
        errors, repeated = _errors(loss, problem, device)
    except torch.OutOfMemoryError as failure:
        return Answer("unknown", detail=_line(failure))
    except Exception as failure:  # compilers and drivers fail in ways of their own
        return Answer("unusable", detail=_line(failure))
    for what, error in errors.items():
        if not error <= TOLERANCES[problem.dtype]:
            limit = TOLERANCES[problem.dtype]
            return Answer("wrong", error, f"{what} has a relative error of {error:.1e}, above {limit:.0e}")
    if not repeated:
        return Answer("wrong", max(errors.values()), "the same input gives other bits")
    return Answer("right", max(errors.values()))


def _line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"


def _errors(loss: str, problem: Problem, device: torch.device) -> tuple[dict[str, float], bool]:
    """Relative RMS errors of the loss and its gradients, by what they are of, NaN where a value is not finite; and
    whether repetitions gave the same bits."""
    actual = _solve(loss, problem, "triton", device)
    exact = problem._replace(arguments=_converted(problem.arguments, torch.device("cpu"), torch.float64))
    expected = _solve(loss, exact, "reference", torch.device("cpu"))
    errors = {what: float(_rms(actual[what].double().cpu() - x) / _rms(x)) for what, x in expected.items()}
    for _ in range(REPETITIONS if device.type == "cuda" else 1):
        if device.type == "cuda":
            _poison(device)
        again = _solve(loss, problem, "triton", device)
        if not all(torch.equal(actual[name], again[name]) for name in actual):
            return errors, False
    return errors, True


def _poison(device: torch.device) -> None:
    """What is allocated next holds NaN, so that an element which no kernel writes shows."""
    filled = [torch.full((2**power,), torch.nan, device=device) for power in range(8, 21) for _ in range(2)]
    del filled


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _solve(loss: str, problem: Problem, backend: str, device: torch.device) -> dict[str, Tensor]:
    """The losses, and the gradients of a sum of them, flat."""
    import optima_kernels

    arguments = _converted(problem.arguments, device)
    if backend == "reference":
        arguments = {name: x for name, x in arguments.items() if not name.startswith("lse")}
    trained = {name: _tensors(arguments[name]) for name in problem.trained if name in arguments}
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


def ptxas_version() -> str:
    """Of the assembler that Triton takes, which is of its own."""
    from triton import knobs

    return str(knobs.nvidia.ptxas.version)


@dataclass
class _Process:
    """A process that answers; what it says besides goes to a file."""

    popen: subprocess.Popen[bytes]
    said: IO[str]
    unread: bytes = b""

    def write(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line.encode())
        self.popen.stdin.flush()

    def read_line(self, until: float) -> str | None:
        """The next line; empty at the end of its output, None where none came until then."""
        assert self.popen.stdout is not None
        output = self.popen.stdout.fileno()
        while b"\n" not in self.unread:
            if not select.select([output], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            chunk = os.read(output, 65536)
            if not chunk:
                return ""
            self.unread += chunk
        line, self.unread = self.unread.split(b"\n", 1)
        return line.decode(errors="replace") + "\n"

    def end(self) -> str:
        """Ends it; returns the last of what it said."""
        self.popen.kill()
        self.popen.wait()
        self.said.seek(0)
        return " ".join(self.said.read().split())[-300:]


_running: list[_Process] = []


def ask(loss: str, variant: str, device: torch.device) -> Answer:
    """What another process finds on this device. Where none can be started, nothing is found out."""
    request = json.dumps({"loss": loss, "variant": variant, "device": str(device)}) + "\n"
    for _ in range(2):  # a process that waited for long enough may just be ending
        fresh = not _running or _running[0].popen.poll() is not None
        try:
            process = _started() if fresh else _running[0]
            process.write(request)
            answer = _answer(process)
        except OSError as failure:
            answer = Answer("unknown", detail=f"no process can be asked: {_line(failure)}") if fresh else None
        if answer is not None:
            return answer
        said = process.end()
        status = process.popen.returncode
        _running.clear()
        if fresh:
            return Answer("unusable", detail=f"the process that ran them ended with status {status}: {said}")
    return Answer("unknown", detail="no process can be asked")


def _started() -> _Process:
    _running.clear()
    root = str(Path(__file__).parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed with the process)
    popen = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment)
    _running.append(_Process(popen, said))
    return _running[0]


def _answer(process: _Process) -> Answer | None:
    """None where it ended without one."""
    until = time.monotonic() + ANSWER_SECONDS
    while (line := process.read_line(until)) is not None:
        if not line:
            process.popen.wait()
            return None
        if line.startswith(MARK):
            return Answer(**json.loads(line.removeprefix(MARK)))
    process.end()
    _running.clear()
    return Answer("unknown", detail=f"no answer came within {ANSWER_SECONDS:.0f} seconds")


def main() -> None:
    """Answers requests until there are none for a while."""
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        device = torch.device(request["device"])
        answer = _checked(request["loss"], request["variant"], device)
        print(MARK + json.dumps(asdict(answer)), flush=True)
        if answer.verdict == "unusable":
            return  # CUDA may refuse every later call


def _checked(loss: str, variant: str, device: torch.device) -> Answer:
    """`check`, where making the device ready is nobody's fault."""
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)
        except Exception as failure:
            return Answer("unknown", detail=_line(failure))
    return check(loss, variant, device)


if __name__ == "__main__":
    main()
