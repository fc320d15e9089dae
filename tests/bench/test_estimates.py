"""Estimates: waves, products and passes as a person would count them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.suites import estimates
from optima_kernels.attention.tiles import Tiling
from optima_kernels.inspect import sass
from optima_kernels.inspect.fake_driver import Compiled, Launch, VendorProduct
from optima_kernels.inspect.sass import Instruction, executed

ROOT = Path(__file__).parents[2]
COMPILED = Compiled("a_kernel", "sm_90", 4, 3, 128, 0, 0, 0, True, "wgmma.mma_async", False, False)


def launch(programs: int, registers: int = 128) -> Launch:
    """Of blocks of which an SM holds four at 128 registers."""
    return Launch(replace(COMPILED, registers=registers), (programs, 1, 1), Path("none.cubin"))


@pytest.mark.parametrize(
    ("programs", "slower"), [(132 * 4, 1.0), (132 * 8, 1.0), (132 * 5, 1.0), (133, 2 * 132 / 133), (66, 2.0)]
)
def test_a_last_wave_costs_what_its_fullest_multiprocessor_does(programs: int, slower: float) -> None:
    assert launch(1).compiled.resident == 4
    assert estimates.last_wave(launch(programs), estimates.MACHINE) == pytest.approx(slower, rel=1e-6)


def test_a_product_takes_its_operations_or_its_bytes() -> None:
    machine = estimates.MACHINE
    large = VendorProduct(1, 8192, 8192, 8192, torch.bfloat16)
    seconds = estimates.of_product(large, machine)
    assert large.flops / machine.flops <= seconds <= 1.1 * large.flops / machine.flops
    thin = VendorProduct(1, 8192, 8192, 1, torch.bfloat16)
    assert estimates.of_product(thin, machine) == pytest.approx(2 * 8192 * (8192 + 2) / machine.bytes, rel=0.01)


def test_a_loop_counts_what_its_tiles_execute() -> None:
    """Of six instructions a branch leaps over two, which only edges execute; the loop's own branch goes back."""
    names = ["MUFU.EX2", "FADD", "BRA", "FSEL", "FSEL", "FFMA"]
    body = [Instruction(16 * i, name, " 0x50" if name == "BRA" else "") for i, name in enumerate(names)]
    assert [x.name for x in executed(body)] == ["MUFU.EX2", "FADD", "BRA", "FFMA"]
    assert len(executed([*body, Instruction(96, "BRA", " 0x0")])) == 5


def test_a_loop_that_loads_ahead_is_the_way_and_of_such_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = (["MUFU.EX2"], ["MUFU.EX2", "LDGSTS.E", "FADD"], ["LDGSTS.E", "MUFU.EX2"], ["LDGSTS.E"])
    code: list[Instruction] = []
    for body in bodies:
        start = 16 * len(code)
        code += [Instruction(start + 16 * i, name, "") for i, name in enumerate(body)]
        code.append(Instruction(16 * len(code), "BRA", f" {start:#x}"))
    monkeypatch.setattr(sass, "instructions", lambda cubin: code)
    body = sass.loop_of_exponentials(Path("of this test.cubin"))
    assert [x.name for x in body] == ["LDGSTS.E", "MUFU.EX2", "BRA"]
    assert sass.clocks_of_an_exponential(Path("of this test.cubin")) == pytest.approx((3 / 1 + 8) / 32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("owner", ["queries", "keys"])
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (100, 70), (130, 257)])
def test_tiles_that_are_visited_have_an_element_that_counts(queries: int, keys: int, owner: str, causal: bool) -> None:
    """Every such tile, and of those that programs of keys walk over all behind the first."""
    tiling = Tiling(32, 64, 4, 1)
    found = 0
    for i in range(0, queries, tiling.queries):
        for j in range(0, keys, tiling.keys):
            last = min(i + tiling.queries, queries) - 1
            found += not causal or (last >= j if owner == "queries" else i + tiling.queries > j)
    assert estimates.visited(queries, keys, tiling, owner, causal) == found * tiling.queries * tiling.keys


def test_passes_run_one_after_the_other() -> None:
    machine = estimates.MACHINE
    expected = 1.0 + 1.0 / 0.85 + 3 * machine.launch_seconds
    assert estimates.of_passes(machine.bytes, machine.flops, 3) == pytest.approx(expected)


def test_measured_times_stand_beside_estimates(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    lines = [
        {"part": "kernels", "item": "attention kl | optima", "ok": True, "graph": 0.25, "wall": 0.9, "host": 0.7},
        {"part": "kernels", "item": "attention kl | eager", "ok": True, "graph": None, "wall": 3.5, "host": 0.4},
        {"part": "correctness", "item": "attention #0", "ok": True},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    found = estimates.measurements(file)
    assert found["attention kl | optima"] == {"gpu": 0.25, "host": 0.7}
    assert found["attention kl | eager"]["gpu"] == 3.5
    assert len(found) == 2


def test_every_row_has_a_cell_a_column_and_cards_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"gpu": 2.0, "host": 0.5}, {}]
    row = estimates._row("attention kl", "optima", 1e-3, said, 0.3, "20%", "issue")
    assert row[:8] == ["attention kl", "optima", "1.000", "2.000", "not measured", "0.30", "0.50", "not measured"]
    monkeypatch.setattr(estimates, "cases", lambda: iter(()))
    monkeypatch.setattr(estimates, "estimates", lambda ours, measured: [row for _ in measured])
    monkeypatch.setattr(estimates, "memories", lambda measured: iter(()))
    table, *_ = estimates.tables(None)
    assert len(table.rows) == len(list((ROOT / "bench/results").glob("gpu-*.jsonl"))) == 2
    assert len(table.header) == len(row)
    assert "measured, NVIDIA H200" in " ".join(table.header)
