"""What a multiprocessor of each GPU has, and how much of it a compiled kernel takes."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What the blocks of a kernel share on one multiprocessor, or compute unit, and how many of those there are.

    Registers are counted for one lane and divided among the warps of a scheduler; memory is in bytes. `multiprocessors`
    are those of `model`, the largest that is sold in numbers.
    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; data sheets; AMD CDNA 3
    instruction set architecture, and LLVM's "User Guide for AMDGPU Backend".
    """

    model: str
    multiprocessors: int
    warps: int
    blocks: int
    shared: int
    shared_of_a_block: int
    matrix_instruction: str
    tensor_columns: int = 0
    lanes: int = 32
    schedulers: int = 4
    registers: int = 512
    register_step: int = 8
    shared_reserved: int = 1024

    def resident(self, registers: int, shared: int, warps: int, tensor_columns: int) -> int:
        """How many blocks of `warps` warps a multiprocessor holds at once."""
        rounded = math.ceil(max(registers, 1) / self.register_step) * self.register_step
        limits = [self.blocks, min(self.registers // rounded * self.schedulers, self.warps) // warps]
        if shared + self.shared_reserved:
            limits.append(self.shared // (shared + self.shared_reserved))
        if tensor_columns:
            limits.append(self.tensor_columns // tensor_columns)
        return min(limits)


MMA = r"\bmma\.sync\S*"
CHIPS = {
    "sm_80": Chip("A100", 108, 64, 32, 164 * 1024, 163 * 1024, MMA),
    "sm_89": Chip("L40S", 142, 48, 24, 100 * 1024, 99 * 1024, MMA),
    "sm_90": Chip("H100", 132, 64, 32, 228 * 1024, 227 * 1024, r"\bwgmma\.mma_async\S*"),
    "sm_100": Chip("B200", 148, 64, 32, 228 * 1024, 227 * 1024, r"\btcgen05\.mma\S*", 512),
    "sm_120": Chip("RTX 5090", 170, 48, 24, 100 * 1024, 99 * 1024, MMA),
}

# Largest number of programs along x, y and z (CUDA C++ Programming Guide, as above).
GRID_LIMITS = (2**31 - 1, 65535, 65535)
