"""What this machine offers, and what OPTIMA will use of it."""

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass

import torch
from rich.table import Table

from optima.commands.console import make_console
from optima.commands.options import DoctorConfig
from optima_kernels.shared import selfcheck
from optima_kernels.shared.dispatch import HAS_TRITON, INTERPRETED


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
        _accelerator("DALI", "nvidia.dali", gpu, "decodes the images of real data", "torch loads real data"),
    ]


def doctor(config: DoctorConfig) -> None:
    """Prints what was found."""
    table = _table("", "found", "used")
    for finding in examine():
        table.add_row(finding.name, finding.found, finding.used)
    make_console().print(table)
    if config.check:
        check_kernels()


def check_kernels() -> None:
    """Compares every loss's Triton kernels with the reference, keeps the outcomes for later runs, and prints them."""
    gpu = torch.cuda.is_available()
    if not (HAS_TRITON and (gpu or INTERPRETED)):
        missing = "GPU" if HAS_TRITON else "triton package"
        hint = "; TRITON_INTERPRET=1 checks them in Triton's interpreter" if HAS_TRITON else ""
        print(f"\nNo {missing} is found, so there are no Triton kernels to check{hint}.")
        return
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    table = _table("kernels of", "for", "checked on", "outcome", "largest error")
    for loss, variant in selfcheck.everything_usual():
        outcome = selfcheck.check_anew(loss, variant, device)
        verdict = outcome.verdict if not outcome.detail else f"{outcome.verdict}: {outcome.detail}"
        error = "" if outcome.error is None else f"{outcome.error:.1e}"
        table.add_row(loss, variant, outcome.device, verdict, error)
    make_console().print("", table)


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading)
    return table


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
