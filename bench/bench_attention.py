"""Attention-map loss on a CPU: time and extra memory beside eager torch, compiled eager torch and TextBrewer.

    python -m pip install --no-deps textbrewer==0.2.1.post1
    python bench/bench_attention.py time      # forward + backward, ratios to eager
    python bench/bench_attention.py memory    # extra peak memory, gradients included, N up to 8192

Like for like: every peer gets the same q and k, does its own products and softmax, and is first checked to give our
gradients. Runs of all peers alternate and the best of each counts. TextBrewer's cross entropy differs from KL by a
constant; what it is handed is scores for "kl" and maps for "mse", as its users do. A peer that is not installed is
skipped. Extra memory is the growth of a fresh process's peak resident memory over what the inputs took.
"""

import argparse
import importlib
import importlib.util
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from optima_kernels import attention_map_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
KINDS = ("kl", "mse")
TIMED_SHAPES = ((4, 12, 1024, 64), (8, 12, 257, 64))
MEMORY_SHAPES = tuple((4, 12, n, 64) for n in (512, 1024, 2048, 4096, 8192))
LARGEST_EAGER = 2048  # maps of 4096 tokens take 3 GiB each


def eager_loss(kind: str) -> Loss:
    def loss(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        scores_s = q_s @ k_s.transpose(-1, -2) * q_s.shape[-1] ** -0.5
        with torch.no_grad():
            scores_t = q_t @ k_t.transpose(-1, -2) * q_t.shape[-1] ** -0.5
        if kind == "mse":
            return F.mse_loss(scores_s.softmax(-1), scores_t.softmax(-1))
        rows = q_s.shape[0] * q_s.shape[1] * q_s.shape[2]
        return F.kl_div(scores_s.log_softmax(-1), scores_t.log_softmax(-1), reduction="sum", log_target=True) / rows

    return loss


def textbrewer_loss(kind: str, textbrewer: ModuleType) -> Loss:
    def loss(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        scores_s = q_s @ k_s.transpose(-1, -2) * q_s.shape[-1] ** -0.5
        with torch.no_grad():
            scores_t = q_t @ k_t.transpose(-1, -2) * q_t.shape[-1] ** -0.5
        if kind == "mse":
            return textbrewer.att_mse_loss(scores_s.softmax(-1), scores_t.softmax(-1))
        # Without a mask it drops the weight of every negative score, which is meant for masks added to scores.
        return textbrewer.att_ce_loss(scores_s, scores_t, mask=torch.ones(q_s.shape[0], q_s.shape[2]))

    return loss


def textbrewer_losses() -> ModuleType | None:
    """Its file of losses alone: the package's own import wants a dozen others."""
    package = importlib.util.find_spec("textbrewer")
    if package is None:
        return None
    sys.modules.setdefault("textbrewer", importlib.util.module_from_spec(package))  # not executed
    return importlib.import_module("textbrewer.losses")


def ours(kind: str) -> Loss:
    return lambda *tensors: attention_map_loss(*tensors, kind=kind)


def inputs(batch: int, heads: int, tokens: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(4)]
    return [x.requires_grad_(i < 2) for i, x in enumerate(tensors)]


def forward_backward(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*tensors), tensors[:2])


def peers(kind: str, compiled: bool) -> dict[str, Loss]:
    result = {"eager": eager_loss(kind), "optima": ours(kind)}
    if compiled:
        result["torch.compile(eager)"] = torch.compile(eager_loss(kind))
    textbrewer = textbrewer_losses()
    if textbrewer is not None:
        result["textbrewer"] = textbrewer_loss(kind, textbrewer)
    return result


def print_times(repeats: int, compiled: bool) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, forward + backward, best of {repeats}")
    for shape in TIMED_SHAPES:
        for kind in KINDS:
            tensors, losses = inputs(*shape), peers(kind, compiled)
            expected = forward_backward(losses["eager"], tensors)
            for name, loss in losses.items():
                for gradient, target in zip(forward_backward(loss, tensors), expected, strict=True):
                    error = (gradient - target).norm() / target.norm()
                    assert error < 1e-4, f"{name} gives another gradient: relative error {error:.1e}"
            best = dict.fromkeys(losses, float("inf"))
            for _ in range(repeats):
                for name, loss in losses.items():
                    start = time.perf_counter()
                    forward_backward(loss, tensors)
                    best[name] = min(best[name], time.perf_counter() - start)
            for name, seconds in best.items():
                print(f"B, H, N, d = {shape} {kind:4} {name:21} {seconds * 1e3:8.1f} ms {seconds / best['eager']:6.3f}")


def print_memory() -> None:
    print("extra peak memory of forward + backward, gradients of q and k included")
    for kind in KINDS:
        for shape in MEMORY_SHAPES:
            mebibytes = {
                name: _extra_memory(name, kind, shape)
                for name in ("eager", "optima")
                if name == "optima" or shape[2] <= LARGEST_EAGER
            }
            ratio = f"1/{mebibytes['eager'] / mebibytes['optima']:.1f}" if "eager" in mebibytes else ""
            sizes = ", ".join(f"{name} {size:8.1f} MiB" for name, size in mebibytes.items())
            print(f"B, H, N, d = {shape} {kind:4} {sizes} {ratio}", flush=True)


def _extra_memory(name: str, kind: str, shape: tuple[int, ...]) -> float:
    command = [sys.executable, __file__, "one", name, kind, *map(str, shape)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure_memory(name: str, kind: str, shape: list[int]) -> None:
    loss = {"eager": eager_loss, "optima": ours}[name](kind)
    forward_backward(loss, inputs(2, 2, 33, shape[-1]))  # what libraries allocate at their first call
    tensors = inputs(*shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward_backward(loss, tensors)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("time")
    timing.add_argument("--repeats", type=int, default=5)
    timing.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler")
    commands.add_parser("memory")
    one = commands.add_parser("one")
    one.add_argument("name")
    one.add_argument("kind")
    one.add_argument("shape", type=int, nargs=4)
    arguments = parser.parse_args()
    if arguments.command == "time":
        print_times(arguments.repeats, not arguments.no_compile)
    elif arguments.command == "memory":
        print_memory()
    else:
        _measure_memory(arguments.name, arguments.kind, arguments.shape)


if __name__ == "__main__":
    main()
