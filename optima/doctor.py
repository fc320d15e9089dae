"""What this machine offers, and what OPTIMA will use of it."""

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class DoctorConfig:
    """The doctor takes no settings."""


@dataclass(frozen=True)
class Finding:
    """One thing looked for: whether it was found and in which version, and what follows."""

    name: str
    found: str
    used: str


def examine() -> list[Finding]:
    """Looks for everything that OPTIMA can make use of."""
    gpu = torch.cuda.is_available()
    triton = _module("triton")
    return [
        Finding("Python", platform.python_version(), "yes"),
        Finding("torch", torch.__version__, "yes"),
        Finding("CPU threads", str(torch.get_num_threads()), "yes"),
        Finding(
            "GPU",
            torch.cuda.get_device_name() if gpu else "not found",
            "models run on it" if gpu else "models run on the CPU",
        ),
        Finding(
            "Triton",
            triton or "not found",
            "losses run on Triton kernels" if triton and gpu else "losses run on the blocked torch backend",
        ),
        _accelerator("flash-attn", "flash_attn", gpu, "attention through it", "attention through torch"),
        _accelerator("apex", "apex.optimizers", gpu, "on request", "torch's fused AdamW"),
        _accelerator("DALI", "nvidia.dali", True, "not used by pictograms", "not needed by pictograms"),
    ]


def doctor(config: DoctorConfig) -> None:
    """Prints what was found."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for heading in ("", "found", "used"):
        table.add_column(heading)
    for finding in examine():
        table.add_row(finding.name, finding.found, finding.used)
    Console().print(table)


def _accelerator(name: str, module: str, usable: bool, used: str, instead: str) -> Finding:
    found = _module(module)
    return Finding(name, found or "not found", used if found and usable else instead)


def _module(name: str) -> str | None:
    """The version of an importable module, None if it is missing or fails to import."""
    try:
        module = importlib.import_module(name)
    except Exception:  # an accelerator built for another torch or driver may fail in any way
        return None
    return str(getattr(module, "__version__", "found"))
