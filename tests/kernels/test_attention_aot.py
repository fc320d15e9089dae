"""The attention kernels compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

# All 48 kernels on four targets take minutes; by default the plain KL kernels of width 64 in bf16 stand for them.
EVERYTHING = os.environ.get("OPTIMA_TEST_AOT") == "all"

COMPILE = """
import sys
from optima_kernels.attention.triton import shipped_kernels

target, folder, everything = sys.argv[1:]
for kernel in shipped_kernels(target):
    if everything == "True" or (" kl " in kernel.name and kernel.name.endswith("d64 plain")):
        compiled = kernel.compile(target)
        for form in ("ptx", "amdgcn"):
            if form in compiled.asm:
                name = f"{kernel.name.replace(' ', '_')}-{compiled.metadata.shared}.{form}"
                open(f"{folder}/{name}", "w").write(compiled.asm[form])
"""

# Products in the assembly of each target, and the shared memory that a block may have, in bytes.
PRODUCTS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@pytest.mark.parametrize("target", list(PRODUCTS))
def test_kernels_compile_without_spills_and_use_matrix_instructions(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", COMPILE, target, folder, str(EVERYTHING)]
        subprocess.run(command, env=environment, check=True)
        files = sorted(Path(folder).iterdir())
        assert files
        for file in files:
            assembly = file.read_text()
            if "fp32" not in file.name or target.startswith("gfx"):
                assert PRODUCTS[target] in assembly, file.name
            assert int(file.stem.rpartition("-")[2]) <= SHARED[target], file.name
            assert _spilled_bytes(file, target) == 0, file.name


def _spilled_bytes(file: Path, target: str) -> int:
    """Registers that went to memory. On AMD those kept in other registers do not count."""
    if target.startswith("gfx"):
        return sum(
            map(int, re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", file.read_text()))
        )
    from triton.backends.nvidia.compiler import get_ptxas

    number = int(target[3:])
    command = [
        get_ptxas(number).path,
        "-v",
        f"--gpu-name=sm_{number}{'a' * (number >= 90)}",
        str(file),
        "-o",
        os.devnull,
    ]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", report)))
