"""Whether the kernels compute what they should on this GPU: random problems, equal bits, graphs, sanitizers, tests."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu import strategies
from bench.gpu.context import Context, Item, Wrong
from bench.gpu.draws import Call, check, draw, linear
from bench.gpu.lines import ROOT
from bench.gpu.shapes import full_chip

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def about(context: Context) -> Iterator[Item]:
    """Versions, without which results say little."""

    def versions() -> dict[str, Any]:
        from bench import report

        return {"about": report.describe(context.device) | {"ptxas": _ptxas(), "driver": _driver()}}

    yield Item("versions", versions)


def _ptxas() -> str:
    from triton import knobs

    return str(getattr(knobs.nvidia.ptxas, "version", ""))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def drawn(loss: str, numbers: range) -> Callable[[Context], Iterator[Item]]:
    """Random problems of these numbers."""

    def items(context: Context) -> Iterator[Item]:
        for i in numbers[:2] if context.rehearse else numbers:
            yield Item(f"{loss} #{i}", lambda i=i: check(draw(loss, i, context), context))  # type: ignore[misc]

    return items


def bits(context: Context) -> Iterator[Item]:
    """The same bits again and again, at sizes that keep the whole chip busy."""
    repetitions = 2 if context.rehearse else 200

    def repeated(make: Callable[[], Callable[[], list[Tensor]]]) -> dict[str, Any]:
        run = make()
        first = [x.clone() for x in run()]
        for i in range(repetitions):
            if not all(torch.equal(x, y) for x, y in zip(first, run(), strict=True)):
                raise Wrong(f"other bits at repetition {i + 1}")
        return {"repetitions": repetitions, "finite": all(bool(torch.isfinite(x).all()) for x in first)}

    for shape in full_chip(context):
        yield Item(shape.name, lambda make=shape.ours: repeated(make))  # type: ignore[misc]


def chunks(context: Context) -> Iterator[Item]:
    """More tokens than `linear_kl` holds at once."""
    for i in range(2 if context.rehearse else 16):

        def run(i: int = i) -> dict[str, Any]:
            rng = random.Random(f"{context.seed} chunks {i}")
            torch.manual_seed(i)
            tokens = 70 if context.rehearse else rng.randint(2500, 9000)
            vocabulary = 203 if context.rehearse else rng.choice([997, 8003, 16384])
            dtype = rng.choice([BFLOAT16, BFLOAT16, FLOAT32, FLOAT16])
            return check(linear(rng, context, dtype, tokens, vocabulary, [64, 96]), context, repetitions=1)

        yield Item(f"many tokens #{i}", run)


def autocast(context: Context) -> Iterator[Item]:
    """float32 arguments under autocast: as right as the narrow dtype allows, with float32 gradients."""
    for loss in ("hidden", "linear", "attention"):
        for i in range(1 if context.rehearse else 4):
            for dtype in (BFLOAT16, FLOAT16) if i < 2 and not context.rehearse else (BFLOAT16,):

                def run(loss: str = loss, i: int = i, dtype: torch.dtype = dtype) -> dict[str, Any]:
                    call = draw(loss, 1000 + i, context, FLOAT32)
                    with torch.autocast(context.device.type, dtype):
                        found = check(call, context, 1, tolerance=2e-2 if dtype == BFLOAT16 else 1e-2)
                        gradients = [x for name, x in call.run("triton").items() if name != "losses"]
                    if any(x.dtype != FLOAT32 for x in gradients):
                        raise Wrong(f"gradients of float32 arguments are {gradients[0].dtype}")
                    return found

                yield Item(f"{loss} #{i} {str(dtype).removeprefix('torch.')}", run)


def graphs(context: Context) -> Iterator[Item]:
    """A captured call computes what the call does, on new values; nothing waits for the device."""
    for loss in ("attention", "hidden", "linear"):
        for i in range(1 if context.rehearse else 5):
            call = draw(loss, 2000 + i, context, BFLOAT16)
            yield Item(f"{loss} #{i} without waiting", lambda call=call: _without_waiting(call, context))  # type: ignore[misc]
            yield Item(f"{loss} #{i} captured", lambda call=call: _captured(call, context))  # type: ignore[misc]


def _without_waiting(call: Call, context: Context) -> dict[str, Any]:
    call.run("triton")
    if context.device.type != "cuda":
        return {"call": call.name}
    context.finish()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"call": call.name}


def _captured(call: Call, context: Context) -> dict[str, Any]:
    if context.device.type != "cuda":
        return {"call": call.name}
    stream = torch.cuda.Stream(context.device)
    stream.wait_stream(torch.cuda.current_stream(context.device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run("triton")
    torch.cuda.current_stream(context.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run("triton")
    with torch.no_grad():
        changed = call.tensors["q_s" if "q_s" in call.tensors else "h_s"]
        for x in changed if isinstance(changed, list) else [changed]:
            x[:1].mul_(0.5)  # a layout may have one sample for all
    graph.replay()
    expected = call.run("triton")
    if not all(torch.equal(captured[name], expected[name]) for name in expected):
        raise Wrong(f"a replay differs from the call: {call.name}")
    return {"call": call.name}


def small(context: Context) -> Iterator[Item]:
    """Few tiles, for programs that watch every access and take a hundred times as long."""
    small_context = Context(context.device, True, context.seed)
    for i in range(1 if context.rehearse else 8):
        for loss in ("attention", "linear", "hidden"):
            call = draw(loss, 3000 + i, small_context, BFLOAT16 if i % 4 else FLOAT32)
            yield Item(f"{loss} #{i}", lambda call=call: _ran(call, context))  # type: ignore[misc]


def _ran(call: Call, context: Context) -> dict[str, Any]:
    call.run("triton")
    context.finish()
    return {"call": call.name}


def selfchecks(context: Context) -> Iterator[Item]:
    """What a first use on this GPU would ask."""
    from optima_kernels.shared import selfcheck

    def run(loss: str, variant: str) -> dict[str, Any]:
        outcome = selfcheck.check_anew(loss, variant, context.device)
        if outcome.verdict != "right":
            raise Wrong(f"{outcome.verdict}: {outcome.detail}")
        return {"error": outcome.error}

    for loss, variant in selfcheck.everything_usual()[: 1 if context.rehearse else None]:
        yield Item(f"{loss} {variant}", lambda loss=loss, variant=variant: run(loss, variant))  # type: ignore[misc]


def tested(*files: str) -> Callable[[Context], Iterator[Item]]:
    """Files of the tests marked gpu, but for those that compile, which take longest."""
    return lambda context: _tests(context, files)


def _tests(context: Context, files: Sequence[str]) -> Iterator[Item]:
    if context.rehearse:
        yield Item("none here", lambda: {})
        return
    for told in told_by_pytest([f"tests/gpu/{file}" for file in files], "-k", "not compiled"):
        yield Item(told["test"].removeprefix("tests/gpu/"), lambda told=told: _verdict(told))  # type: ignore[misc]


def told_by_pytest(files: Sequence[str], *options: str) -> Iterator[dict[str, str]]:
    """Every test of the files as soon as it is over: "test", "outcome", and in "words" what it failed by."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "bench.gpu.told"]
    with subprocess.Popen(
        [*command, *options, *files], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"test": '):
                yield json.loads(line)


def _verdict(told: dict[str, str]) -> dict[str, Any]:
    if told["outcome"] == "failed":
        raise Wrong(told["words"])
    return {"verdict": told["outcome"]}


GROUPS: dict[str, Callable[[Context], Iterator[Item]]] = {
    "about": about,
    "attention": drawn("attention", range(18)),
    "attention-more": drawn("attention", range(18, 36)),
    "hidden": drawn("hidden", range(60)),
    "linear": drawn("linear", range(30)),
    "linear-more": drawn("linear", range(30, 60)),
    "bits": bits,
    "chunks": chunks,
    "autocast": autocast,
    "graphs": graphs,
    "selfcheck": selfchecks,
    "sanitized": small,
    "raced": small,
    "strategies-attention": strategies.attention,
    "strategies-hidden": strategies.hidden,
    "strategies-linear": strategies.linear,
    "tests-engine": tested("test_engine.py", "test_whole_step.py", "test_start.py"),
    "tests-losses": tested("test_losses.py", "test_attention.py"),
}
