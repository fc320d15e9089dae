"""In which dtypes a step of the engine gives its operands to the kernels."""

import importlib
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from whole_step import make_distiller

import optima_kernels.hidden.operator
import optima_kernels.logits.operator
from optima_core import DistillerConfig
from optima_kernels.shared.dispatch import INTERPRETED

OPERANDS = {
    "attention": ("q_s", "k_s", "q_t", "k_t"),
    "hidden": ("h_s", "weight"),
    "logits": ("h_s", "w_s", "h_t", "w_t"),
}
"""What is multiplied. The teacher's hidden states are subtracted."""


@pytest.mark.parametrize("backend", ["blocked", "triton"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_operands_of_products_come_in_the_precision_that_is_asked_for(
    precision: Literal["bf16", "fp32"], dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if not INTERPRETED:
            pytest.skip("the models are on the CPU")
    reached: dict[str, set[torch.dtype]] = {loss: set() for loss in OPERANDS}

    def watch(loss: str) -> None:
        module = importlib.import_module(f"optima_kernels.{loss}.{backend}")
        solve = module.solve

        def solved(layers: Sequence[Any], *rest: Any) -> Any:
            reached[loss] |= {getattr(layer, name).dtype for layer in layers for name in OPERANDS[loss]}
            return solve(layers, *rest)

        monkeypatch.setattr(module, "solve", solved)
        monkeypatch.setattr(importlib.import_module(f"optima_kernels.{loss}"), "choose_backend", lambda *_: backend)

    for loss in OPERANDS:
        watch(loss)
    solvers = (optima_kernels.hidden.operator._solver, optima_kernels.logits.operator._solver)
    for solver in solvers:
        solver.cache_clear()
    make_distiller("cpu", DistillerConfig(rounds=1, steps_per_round=1, precision=precision)).run_round()
    for solver in solvers:
        solver.cache_clear()
    assert reached == {loss: {dtype} for loss in OPERANDS}
