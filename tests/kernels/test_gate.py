"""The gate that compiles for GPUs that are not here: it passes what is right and names every kind of fault."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from optima_kernels.inspect import gate, table
from optima_kernels.inspect.chips import CHIPS, Chip
from optima_kernels.inspect.fake_driver import Compiled, Launch, launches_on
from optima_kernels.inspect.gate import Outcome
from optima_kernels.inspect.problems import problems
from optima_kernels.shared.dispatch import INTERPRETED

COMPILED = Compiled("a_kernel", "sm_90", 4, 3, 100, 0, 49152, 0, True, "wgmma.mma_async", False, False)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own: what is interpreted here is compiled there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """What the gate says of kernels with one fault each."""
    result = run(str(Path(__file__).with_name("planted_kernels.py")))
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spills", "wide_rows spills"),
        ("shared", "bytes of shared memory a block, 232448 at most"),
        ("serialised", "transposed_accumulator has its wgmma instructions serialised (ptxas C7515)"),
        ("eight_warps", "product multiplies by wgmma in 8 warps"),
        ("few_programs", "product multiplies matrices in 131 programs, on 132 multiprocessors"),
        ("large_grid", "doubled is launched on 65536 programs along y, 65535 at most"),
        ("refused", "cannot be launched: no such option"),
        ("uncompilable", "cannot be launched: CompilationError"),
        ("waits", "the host waits for the GPU"),
    ],
)
def test_a_planted_fault_is_named(planted: dict[str, Any], name: str, words: str) -> None:
    assert any(words in fault for fault in planted[name]), planted[name]


def test_a_kernel_without_fault_has_none(planted: dict[str, Any]) -> None:
    assert planted["fine"] == []
    assert planted["few at a small size"] == []
    assert planted["refusal allowed"] == []


def test_launches_and_vendor_products_are_kept_with_their_sizes(planted: dict[str, Any]) -> None:
    assert planted["products"] == [[1, 3, 7, 5]]
    count, target, is_product, instruction, grid = planted["launch"]
    assert (count, target, is_product, grid) == (2, "sm_80", True, [131, 1, 1])
    assert instruction.startswith("mma.sync")


def test_what_the_losses_launch_has_no_fault(tmp_path: Path) -> None:
    """A sample on all targets; `python -m optima_kernels.inspect.gate` has all problems."""
    file = tmp_path / "table.md"
    command = ("-m", "optima_kernels.inspect.gate", "--sample", "--write", str(file))
    result = run(*command, "--jobs", "2")
    assert result.returncode == 0, result.stderr
    names = [problem.name for problem in problems() if problem.sample]
    assert {name.split()[0] for name in names} == {"attention", "hidden", "vocabulary"}
    text = file.read_text()
    assert all(f"| {name} |" in text for name in names)


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("sm_90", ["kl float32 teacher", "kl d256 bool", "kl relation of 2 heads", "32768 features"]),
        ("sm_100", ["kl 300 queries, 1 keys"]),
    ],
)
def test_edges_that_compilers_stumble_over_have_no_fault(target: str, names: list[str]) -> None:
    """A teacher wider than its student's tiles, heads and rows beyond registers and shared memory, a single key."""
    result = run("-m", "optima_kernels.inspect.gate", "--target", target, "--only", *names)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"{len(names)} problems, 0 faults")


def test_every_problem_has_a_name_of_its_own() -> None:
    names = [problem.name for problem in problems()]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(not INTERPRETED, reason="only interpreted kernels are refused")
def test_interpreted_kernels_are_refused_in_one_line() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), launches_on("sm_90"):
        pass
    with pytest.raises(SystemExit):
        gate.main([])


@pytest.mark.parametrize("name", CHIPS)
def test_the_blocks_counted_fit_on_a_multiprocessor_and_no_more(name: str) -> None:
    chip = CHIPS[name]
    total = chip.registers * chip.schedulers * chip.lanes

    def fits(blocks: int, registers: int, shared: int, warps: int) -> bool:
        used = blocks * warps * chip.lanes * registers
        memory = blocks * (shared + chip.shared_reserved)
        return used <= total and memory <= chip.shared and blocks * warps <= chip.warps and blocks <= chip.blocks

    for registers, shared, warps in ((32, 0, 4), (168, 49152, 4), (255, 0, 8), (96, 90000, 8)):
        blocks = chip.resident(registers, shared, warps, 0)
        assert fits(blocks, registers, shared, warps)
        assert not fits(2 * blocks + 1, registers, shared, warps)
    assert Chip("", 1, 64, 32, 2**20, 2**20, "", 512).resident(32, 0, 4, 256) == 2


def outcome(**changes: Any) -> Outcome:
    launch = Launch(replace(COMPILED, **changes), (200, 1, 1), Path("x.cubin"))
    faults = tuple(f"a_kernel {fault}" for fault in gate.faults_of(launch, fills_chip=True))
    return Outcome("attention kl plain d64", launch.compiled.target, (launch,), 1, "", faults)


def test_the_table_keeps_the_sections_of_other_triton_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "table.md"
    import triton

    for version, registers in (("3.6.0", 101), ("3.7.1", 102), ("3.6.0", 103)):
        monkeypatch.setattr(triton, "__version__", version)
        table.write(file, [outcome(registers=registers)])
    parts = file.read_text().split("\n## Triton ")
    assert [part[:5] for part in parts[1:]] == ["3.6.0", "3.7.1"]
    assert "| 103 |" in parts[1]
    assert "| 102 |" in parts[2]


def test_a_row_shows_figures_of_all_targets_programs_and_faults() -> None:
    both = [outcome(), outcome(target="sm_100", registers=80, matrix_instruction="tcgen05.mma", serialised=True)]
    (row,) = table.rows_of(both)
    cells = dict(zip(table.COLUMNS, row.cells(), strict=True))
    assert (cells["registers"], cells["warps"], cells["shared, KiB"]) == ("100 80", "4", "48")
    assert (cells["programs"], cells["C7515"], cells["problems"]) == ("200", "no", "1")
    assert cells["faults"] == "sm_100 has its wgmma instructions serialised (ptxas C7515)"
