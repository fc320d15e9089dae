"""Kernels in the form in which a compiler without a GPU takes them.

A family of kernels lists what it ships in a function `shipped_kernels(target)`; whoever wants to compile, count or
tabulate asks those, and so looks at the very constants that a launch would use.
"""

from dataclasses import dataclass
from typing import Any

import torch

from optima_kernels.dispatch import INTERPRETED

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# What Triton concludes at a launch for a pointer, or a size or stride, that is a multiple of 16.
MULTIPLE_OF_16 = [["tt.divisibility", 16]]

POINTER = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def on_matrix_units(dtype: torch.dtype, target: str) -> bool:
    """Whether products of `dtype` run there: those of float32 not on NVIDIA, whose units would round it to tf32."""
    return dtype != torch.float32 or target.startswith("gfx")


def target_of(device: torch.device) -> str:
    """The name of the device's architecture: one of TARGETS or alike, or "interpreter"."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return (
        str(properties.gcnArchName).split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    )


@dataclass(frozen=True)
class ShippedKernel:
    """One kernel at one configuration: what `triton.compiler.ASTSource` and `triton.compile` want to know.

    `signature`, `constexprs` and `attrs` are by argument name. A tuple argument has a tuple of types, and the
    constants and attributes of its entries are found under (name, position). `uses_dot` says whether it has a product
    for the matrix units.
    """

    name: str
    kernel: Any
    signature: dict[str, str | tuple[str, ...]]
    constexprs: dict[str | tuple[str, int], Any]
    attrs: dict[str | tuple[str, int], Any]
    warps: int
    stages: int
    uses_dot: bool

    def compile(self, target: str) -> Any:
        """Compile for `target`, one of TARGETS or alike; the result's `asm` and `metadata` are Triton's."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(
            fn=self.kernel,
            signature=self.signature,
            constexprs={self._path(key): value for key, value in self.constexprs.items()},
            attrs={self._path(key): value for key, value in self.attrs.items()},
        )
        gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
        return triton.compile(source, target=gpu, options={"num_warps": self.warps, "num_stages": self.stages})

    def _path(self, key: str | tuple[str, int]) -> tuple[int, ...]:
        name, *position = (key,) if isinstance(key, str) else key
        return (self.kernel.arg_names.index(name), *position)
