"""What is compiled for GPUs that are not here keeps the chips' limits and agrees with the committed table."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from optima_kernels import aot

TABLE = Path(__file__).parents[2] / "bench" / "AOT.md"

# A dot with everything around it, a product in a pipeline, a row held whole, and a stream: one of each family. Of the
# first two there is one in float32, too.
SAMPLE = (
    "attention query kl loss grad d64 plain",
    "product state",
    "hidden rows layernorm d1024",
    "vocabulary forward",
)

ASSEMBLY = """
    global_load_dwordx4 v[0:3], v[4:5], off
    global_load_ushort v6, v[4:5], off
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    global_store_dword v[4:5], v6, off
    .private_segment_fixed_size: {scratch}
    .vgpr_count:     {registers}
"""


def run_aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: what is interpreted here is compiled there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "optima_kernels.inspect.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def compiled() -> list[aot.Figures]:
    """Some of the table, made anew."""
    result = run_aot("--json", "--cached", "--kernel", *SAMPLE)
    assert result.returncode == 0, result.stderr
    rows = [{name: tuple(x) if name == "faults" else x for name, x in row.items()} for row in json.loads(result.stdout)]
    return [aot.Figures(**row | {kind: _widths(row[kind]) for kind in ("loads", "stores")}) for row in rows]


def _widths(counts: dict[str, int]) -> dict[int, int]:
    return {int(width): count for width, count in counts.items()}


def fake_kernel(scratch: int = 0, registers: int = 100, shared: int = 8192, *, uses_dot: bool = True) -> Any:
    """A shipped kernel whose compiled form is known."""
    assembly = ASSEMBLY.format(scratch=scratch, registers=registers)
    if not uses_dot:
        assembly = "\n".join(line for line in assembly.splitlines() if "mfma" not in line)
    metadata = SimpleNamespace(shared=shared, num_warps=4, num_stages=1)
    result = SimpleNamespace(asm={"amdgcn": assembly}, metadata=metadata)
    return SimpleNamespace(name="fake", uses_dot=True, compile=lambda target: result)


def has_matrix_instruction(kernel: str, target: str) -> bool:
    """Products have one, but in float32 on NVIDIA only one that would round to tf32."""
    is_product = kernel.startswith(("attention", "product", "hidden difference", "hidden proj", "vocabulary logits"))
    return is_product and ("fp32" not in kernel or target == "gfx942")


def test_every_target_and_family_is_compiled_and_keeps_the_limits(compiled: list[aot.Figures]) -> None:
    assert len(compiled) == (len(SAMPLE) + 2) * len(aot.CHIPS)
    for row in compiled:
        chip = aot.CHIPS[row.target]
        assert row.faults == ()
        assert row.spilled == 0, row
        assert row.shared <= chip.shared_of_a_block, row
        assert bool(row.matrix_instruction) == has_matrix_instruction(row.kernel, row.target), row
        assert max(row.loads) == 128, row


def test_the_blocks_counted_fit_on_a_multiprocessor_and_no_more(compiled: list[aot.Figures]) -> None:
    for row in compiled:
        chip = aot.CHIPS[row.target]
        registers = chip.registers * chip.schedulers * chip.lanes

        def fits(blocks: int, row: aot.Figures = row, chip: aot.Chip = chip, registers: int = registers) -> bool:
            used = blocks * row.warps * chip.lanes * row.registers
            shared = blocks * (row.shared + chip.shared_reserved)
            return used <= registers and shared <= chip.shared and blocks * row.warps <= chip.warps

        assert row.blocks >= 1
        assert fits(row.blocks), row
        # One block more may still seem to fit where registers are handed out in steps, or tensor memory is short.
        assert not fits(2 * row.blocks + 1), row
        assert row.occupancy == row.blocks * row.warps / chip.warps


def test_figures_are_those_of_the_committed_table(compiled: list[aot.Figures]) -> None:
    text = TABLE.read_text()
    if f"triton {triton.__version__})" not in text:
        pytest.skip(f"bench/AOT.md was made by another triton than {triton.__version__}")
    found = aot.differences(compiled, text)
    assert found == [], "run `python -m optima_kernels.inspect.aot --write bench/AOT.md` and look at what changed"


def test_the_committed_table_has_every_kernel_for_every_target() -> None:
    rows = [line.split("|")[1:3] for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    shipped = [(kernel.name, target) for target in aot.CHIPS for kernel in aot.shipped_kernels(target)]
    assert [tuple(cell.strip() for cell in row) for row in rows[1:]] == shipped
    assert len(set(shipped)) == len(shipped)


def test_the_committed_table_shows_no_spills_and_matrix_instructions_for_products() -> None:
    lines = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]
    assert any("fp32" in row["kernel"] for row in rows)
    for row in rows:
        assert row["spilled, B"] == "0", row
        assert int(row["blocks"]) >= 1, row
        assert int(row["shared, B"]) <= aot.CHIPS[row["target"]].shared_of_a_block, row
        assert (row["matrix instruction"] != "-") == has_matrix_instruction(row["kernel"], row["target"]), row


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 7}, "registers"),
        ({"spilled": 16}, "spilled"),
        ({"shared": 1}, "shared"),
        ({"loads": {32: 5}}, "loads"),
        ({"kernel": "another"}, "not in the table"),
    ],
)
def test_a_changed_figure_is_named(compiled: list[aot.Figures], change: dict[str, Any], words: str) -> None:
    text = aot.markdown(compiled)
    assert aot.differences(compiled, text) == []
    (found,) = aot.differences([replace(compiled[0], **change), *compiled[1:]], text)
    assert words in found


def test_what_a_compiled_kernel_says_is_read() -> None:
    row = aot.measure(fake_kernel(), "gfx942")
    assert (row.registers, row.spilled, row.shared) == (100, 0, 8192)
    # 512 registers of a lane hold four waves of 104 on each of four schedulers; 32 waves are the most.
    assert (row.blocks, row.occupancy) == (4, 0.5)
    assert row.matrix_instruction == "v_mfma_f32_32x32x8_bf16"
    assert (row.loads, row.stores) == ({128: 1, 16: 1}, {32: 1})
    assert row.faults == ()


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (fake_kernel(scratch=64), "spills 64 bytes a thread"),
        (fake_kernel(shared=65537), "65537 bytes of shared memory a block, 65536 at most"),
        (fake_kernel(uses_dot=False), "no matrix instruction"),
    ],
)
def test_a_broken_limit_is_a_fault(kernel: Any, fault: str) -> None:
    assert fault in aot.measure(kernel, "gfx942").faults


def test_a_table_that_differs_is_exit_status_1(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    choice = ("--cached", "--target", "gfx942", "--kernel", "vocabulary lse")
    assert run_aot(*choice, "--write", str(table)).returncode == 0
    assert run_aot(*choice, "--check", str(table)).returncode == 0
    table.write_text(table.read_text().replace("100%", "50%"))
    result = run_aot(*choice, "--check", str(table))
    assert result.returncode == 1
    assert "vocabulary lse, gfx942: occupancy 50% -> 100%" in result.stderr


def test_interpreted_kernels_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        aot.main([])
