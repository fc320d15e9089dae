"""A CUDA driver that is not there: every launch is specialised and compiled for a GPU of choice, and nothing runs.

    with launches_on("sm_90") as log:
        hidden_mse(h_s, h_t, backend="triton")  # tensors on the meta device, which stand for CUDA tensors
    log.launches[0].compiled.registers

The project's own launch code runs, so that what is compiled here is what a launch would compile: Triton's JIT
specialises the very arguments, chooses the options, and calls the assembler. What it makes is read and kept by the grid
that it was launched on. Products that torch would hand to the vendor's library are kept by their sizes, and reads of a
tensor by the host, for which a GPU would have to be waited for.

Kernels must not be interpreted: TRITON_INTERPRET must not be set before the first import. Pointers count as aligned to
16 bytes, as those of fresh tensors are.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optima_kernels.inspect.chips import CHIPS
from optima_kernels.shared import dispatch, target

# ptxas's remark that products of a kernel wait for one another although they need not.
SERIALISED = "C7515"
# A wgmma whose second operand is a list of registers, not a descriptor of shared memory.
LEFT_IN_REGISTERS = r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*\{"


@dataclass(frozen=True)
class Compiled:
    """One kernel as it is compiled for a target.

    `registers` and `spilled` bytes are those of a thread, `shared` bytes and `tensor_columns` those of a block.
    `is_product`: it multiplies matrices; `matrix_instruction` is what does so, empty in float32. `serialised`: ptxas
    says that wgmma instructions wait for one another. `left_in_registers`: a wgmma takes its left operand from
    registers.
    """

    kernel: str
    target: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    tensor_columns: int
    is_product: bool
    matrix_instruction: str
    serialised: bool
    left_in_registers: bool

    @property
    def resident(self) -> int:
        """How many blocks a multiprocessor holds at once."""
        return CHIPS[self.target].resident(self.registers, self.shared, self.warps, self.tensor_columns)


@dataclass(frozen=True)
class Launch:
    """A kernel and the programs it was launched with, along x, y and z. `flags`: its arguments that are True or False,
    in their order."""

    compiled: Compiled
    grid: tuple[int, int, int]
    cubin: Path
    flags: tuple[bool, ...] = ()

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class VendorProduct:
    """A product [batch, m, k] x [batch, k, n] that torch would hand to the vendor's library."""

    batch: int
    m: int
    n: int
    k: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass
class Log:
    """What happened in a block of `launches_on`, in order; `host_reads` names what would wait for the GPU."""

    launches: list[Launch] = field(default_factory=list)
    products: list[VendorProduct] = field(default_factory=list)
    host_reads: list[str] = field(default_factory=list)
    operators: int = 0  # calls of torch that a GPU would launch a kernel for
    operator_bytes: int = 0  # what those read and write, the vendor's products left out


@contextmanager
def launches_on(name: str) -> Iterator[Log]:
    """Triton launches in this block compile for the target `name`, a key of `CHIPS`, and are kept in the log.

    Raises RuntimeError where kernels are interpreted.
    """
    if dispatch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    from triton import knobs
    from triton.runtime.driver import driver

    log = Log()
    fake, before = _Driver(name, log), driver._active
    with ExitStack() as stack:
        driver.set_active(fake)
        stack.callback(setattr, driver, "_active", before)
        knobs.runtime.kernel_load_start_hook.add(fake.keep_files)
        stack.callback(knobs.runtime.kernel_load_start_hook.remove, fake.keep_files)
        properties = _properties(name)
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda device=None: properties))
        stack.enter_context(patch.object(target, "architecture", lambda device: name))
        stack.enter_context(patch.object(dispatch, "runs_triton", lambda tensor: True))
        for function in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(patch.object(torch, function, _on_cpu(getattr(torch, function))))
        stack.enter_context(patch.object(torch, "autocast", _on_cpu(torch.autocast)))
        available = _on_cpu(torch.amp.is_autocast_available)
        stack.enter_context(patch.object(torch.amp, "is_autocast_available", available))
        stack.enter_context(_Operators(log))
        yield log


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of a device type, for which the CPU stands: without a GPU torch disables CUDA's autocast."""

    @functools.wraps(function)
    def of_cpu(device_type: str | None = None, *rest: Any, **named: Any) -> Any:
        if device_type is None:
            return function(*rest, **named)
        return function("cpu" if device_type in ("meta", "cuda") else device_type, *rest, **named)

    return of_cpu


def _properties(name: str) -> SimpleNamespace:
    chip = CHIPS[name]
    capability = int(name.removeprefix("sm_"))
    return SimpleNamespace(
        name=chip.model,
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=chip.multiprocessors,
        shared_memory_per_block_optin=chip.shared_of_a_block,
        shared_memory_per_multiprocessor=chip.shared,
        total_memory=80 * 2**30,
        warp_size=chip.lanes,
    )


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the products and host reads that torch itself is asked for."""

    def __init__(self, log: Log) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = log

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.log.host_reads.append(str(func))
            return 1.0
        result = func(*args, **kwargs)
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.log.products.append(_product(name, args))
        elif _is_launched(func, name):
            self.log.operator_bytes += sum(x.numel() * x.element_size() for x in _tensors((args, result)))
        self.log.operators += _is_launched(func, name)
        return result


def _is_launched(func: Any, name: str) -> bool:
    """Whether an operator works on memory: no view, and no fresh memory alone."""
    views = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
    return not views and "empty" not in name


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _factors(name: str, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    tensors = [x for x in args if isinstance(x, Tensor)]
    first = 1 if name in ("addmm", "baddbmm") else 0
    return tensors[first], tensors[first + 1]


def _product(name: str, args: Sequence[Any]) -> VendorProduct:
    left, right = _factors(name, args)
    batch = left.shape[0] if left.dim() == 3 else 1
    return VendorProduct(batch, left.shape[-2], right.shape[-1], left.shape[-1], left.dtype)


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, name: str, log: Log) -> None:
        self.name = name
        self.log = log
        self.utils = self
        self.loading: _Launcher | None = None

    # Kernels are cached by device, so that every target is one of its own.
    def get_current_device(self) -> int:
        return int(self.name.removeprefix("sm_"))

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.get_current_device(), 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        # Shared memory without limit: what is too much is for the reader of the log to say.
        chip = CHIPS[self.name]
        return {"max_shared_mem": 2**31, "multiprocessor_count": chip.multiprocessors, "warpSize": chip.lanes}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and the most threads: nothing that anybody reads but the last."""
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> "_Launcher":
        self.loading = _Launcher(self, metadata)
        return self.loading

    def keep_files(self, module: Any, function: Any, name: str, files: dict[str, str], digest: str) -> None:
        """Triton's hook before a kernel is loaded, which knows the files that the compiler wrote."""
        assert self.loading is not None
        self.loading.files = {Path(file).suffix: Path(file) for file in files.values()}


class _Launcher:
    """Launches one kernel. Triton keeps it with the kernel, so that it outlives the block that it was made in."""

    def __init__(self, driver: _Driver, metadata: Any) -> None:
        self.metadata = metadata
        self.target = driver.name
        self.files: dict[str, Path] = {}

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        from triton.runtime.driver import driver

        active = driver.active
        assert isinstance(active, _Driver)
        flags = tuple(argument for argument in rest if isinstance(argument, bool))
        active.log.launches.append(Launch(self.compiled, (x, y, z), self.files[".cubin"], flags))

    @functools.cached_property
    def compiled(self) -> Compiled:
        metadata, chip = self.metadata, CHIPS[self.target]
        ptx, cubin = self.files[".ptx"].read_text(), self.files[".cubin"]
        registers, spilled = _registers(cubin)
        found = re.search(chip.matrix_instruction, ptx)
        is_hopper_product = found is not None and "wgmma" in found[0]
        return Compiled(
            kernel=metadata.name,
            target=self.target,
            warps=metadata.num_warps,
            stages=metadata.num_stages,
            registers=registers,
            spilled=spilled,
            shared=metadata.shared,
            tensor_columns=getattr(metadata, "tmem_size", None) or 0,
            is_product="tt.dot" in self.files[".ttir"].read_text(),
            matrix_instruction="" if found is None else found[0],
            serialised=is_hopper_product and SERIALISED in _remarks(self.files[".ptx"]),
            left_in_registers=is_hopper_product and re.search(LEFT_IN_REGISTERS, ptx) is not None,
        )


def _registers(cubin: Path) -> tuple[int, int]:
    """Registers of a thread, and the bytes of its stack, where registers are spilled to."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return sizes["REG"], sizes["STACK"] + sizes["LOCAL"]


def _remarks(ptx: Path) -> str:
    """What ptxas says about a kernel for Hopper; Triton throws it away."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as out:
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", out.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
