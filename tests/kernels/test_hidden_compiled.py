"""The hidden-state and vocabulary kernels: bytes counted in the interpreter, and code compiled for absent GPUs."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from optima_kernels import hidden_mse, linear_kl

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in Triton's interpreter")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes loaded and stored by launches from now on, and how many launches there were, by kernel."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    counts: Counter[str] = Counter()
    current = ["none"]
    load, store, launch = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        GridExecutor.__call__,
    )

    def size(pointers, mask) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, pointers, mask, *rest):
        counts[current[0]] += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        counts[current[0]] += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_launch(self, *arguments, **options):
        current[0] = self.fn.__name__
        return launch(self, *arguments, **options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    monkeypatch.setattr(GridExecutor, "__call__", counted_launch)
    return counts


@interpreted
@pytest.mark.parametrize("normalize", [None, "layernorm", "l2"])
def test_unprojected_states_are_read_and_their_gradient_written_once(
    normalize: str | None, seed: int, moved: Counter[str]
) -> None:
    h_s, h_t = torch.randn(2, 37, 200)
    hidden_mse(h_s.requires_grad_(), h_t, normalize=normalize, backend="triton")
    assert 1.0 <= moved["row_kernel"] / (3 * h_s.numel() * 4) <= 1.15, f"seed {seed}"


@interpreted
def test_logits_are_read_and_their_gradient_written_once(seed: int, moved: Counter[str]) -> None:
    h, w = torch.randn(16, 8), torch.randn(5000, 8)
    linear_kl(h.requires_grad_(), w, h.detach() + 1.0, w, backend="triton")
    assert 1.0 <= moved["divergence_kernel"] / (3 * 16 * 5000 * 4) <= 1.15, f"seed {seed}"


@interpreted
def test_a_closed_gate_reads_the_gate_alone(seed: int, moved: Counter[str]) -> None:
    h_s, h_t, weight = torch.randn(64, 40), torch.randn(64, 48), torch.randn(48, 40)
    hidden_mse(h_s.requires_grad_(), h_t, weight.requires_grad_(), gate=torch.zeros(()), backend="triton")
    owed = (h_s.numel() + weight.numel() + 64 * 2) * 4
    assert owed <= sum(moved.values()) <= owed + 64 * 4, f"seed {seed}"


COMPILE = """
import json, sys
from dataclasses import asdict
from optima_kernels import aot
from optima_kernels.triton import hidden, logits

for kernel in [*hidden.shipped_kernels(sys.argv[1]), *logits.shipped_kernels(sys.argv[1])]:
    if kernel.uses_dot or sys.argv[2] == "True":
        print(json.dumps(asdict(aot.measure(kernel, sys.argv[1])) | {"dot": kernel.uses_dot}))
"""

# All kernels on four targets take a minute or two; by default the products on one target stand for them.
EVERYTHING = os.environ.get("OPTIMA_TEST_AOT") == "all"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"] if EVERYTHING else ["sm_90"])
def test_kernels_compile_without_spills_and_use_matrix_instructions(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, target, str(EVERYTHING)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert kernels
    for figures in kernels:
        assert figures["spilled"] == 0, figures
        assert bool(figures["matrix_instruction"]) == figures["dot"], figures
