"""The Triton kernels on a real GPU: right, deterministic, without waiting, in CUDA graphs and compiled."""

import pytest
import torch
from loss_calls import CALLS, Call, attention

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest, seed: int) -> Call:
    """On the CPU, in float32."""
    return CALLS[request.param](torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_a_loss_and_its_gradients_are_those_of_the_reference(
    call: Call, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    call = call.to(device, dtype)
    expected = call.to(dtype=torch.float64).run("reference")
    for name, actual in call.run(backend).items():
        error = float((actual.double() - expected[name]).norm() / expected[name].norm())
        assert error < TOLERANCES[dtype], f"{name}: relative error {error:.1e}"


def test_the_default_backend_is_triton(call: Call, device: torch.device) -> None:
    call = call.to(device)
    by_default, asked = call.run(), call.run("triton")
    assert all(torch.equal(by_default[name], asked[name]) for name in asked)


def test_the_same_input_gives_the_same_bits(call: Call, device: torch.device) -> None:
    call = call.to(device, torch.bfloat16)
    first = call.run("triton")
    for _ in range(5):
        again = call.run("triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_no_loss_waits_for_the_device(call: Call, backend: str, device: torch.device, no_synchronisation) -> None:
    call = call.to(device, torch.bfloat16)
    call.run(backend)  # kernels are compiled and loaded at the first call
    with no_synchronisation():
        call.run(backend)


def test_a_loss_runs_in_a_cuda_graph(call: Call, device: torch.device) -> None:
    call = call.to(device, torch.bfloat16)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run("triton")
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run("triton")
    with torch.no_grad():
        for name in call.trained:
            call.tensors[name].mul_(0.5)
    graph.replay()
    expected = call.run("triton")
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_a_compiled_loss_is_the_same(call: Call, device: torch.device) -> None:
    call = call.to(device)
    compiled = call.run("triton", lambda loss: torch.compile(loss, fullgraph=True))
    for name, expected in call.run("triton").items():
        torch.testing.assert_close(compiled[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_no_map_is_in_memory(kind: str, device: torch.device) -> None:
    call = attention(kind, "none", queries=4096)(torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    call.run("triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call.run("triton")
    used = torch.cuda.max_memory_allocated(device) - before
    maps = 2 * 4 * 4096 * 4096 * 4
    assert used < maps / 8, f"{used / 2**20:.0f} MiB, one map takes {maps / 2**20:.0f}"


def test_a_closed_gate_gives_zeros(call: Call, device: torch.device) -> None:
    call = call.to(device)
    call.tensors["gate"] = torch.zeros((), device=device)
    assert all(float(x.abs().max()) == 0 for x in call.run("triton").values())
