"""How much memory a run took."""

import resource
from pathlib import Path


def peak_mib() -> float:
    """The most memory that this process has held, MiB; on Linux getrusage would count the one that forked it, too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    most = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(most.split()[1]) / 1024
