"""The hidden-state and vocabulary kernels compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

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
