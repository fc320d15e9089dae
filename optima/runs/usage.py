"""What a running process uses: its cores and memory, and the GPUs of the machine."""

import csv
import os
import shutil
import subprocess
import time
from pathlib import Path

PROCESSES = Path("/proc")


class Usage:
    """Cores and memory of the process that holds a run directory, and what NVIDIA's GPUs do, looked at now and then.

    lock: the file that holds the process's number. Where a system does not tell, nothing is said.
    """

    def __init__(self, lock: Path) -> None:
        self.lock = lock
        self._before: tuple[int, float, float] | None = None  # process, CPU seconds, when

    def __call__(self) -> dict[str, str]:
        """What is used, by name: of the "processor" since the last call, or since the process began; of "GPU 0", ..."""
        return self._processor() | self._gpus()

    def _processor(self) -> dict[str, str]:
        try:
            number = int(self.lock.read_text(encoding="utf-8"))
            # The command's name, in brackets, may hold spaces.
            fields = (PROCESSES / str(number) / "stat").read_text().rpartition(")")[2].split()
            status = (PROCESSES / str(number) / "status").read_text().splitlines()
            up = float((PROCESSES / "uptime").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return {}
        tick = os.sysconf("SC_CLK_TCK")
        spent, now = (int(fields[11]) + int(fields[12])) / tick, time.monotonic()
        seconds = up - int(fields[19]) / tick
        if self._before is not None and self._before[0] == number and now > self._before[2]:
            spent, seconds = spent - self._before[1], now - self._before[2]
        self._before = (number, (int(fields[11]) + int(fields[12])) / tick, now)
        resident = next((int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS:")), 0.0)
        cores = spent / max(seconds, 1e-9)
        return {"processor": f"{cores:.1f} of {os.cpu_count()} cores, {resident:.0f} MiB"}

    def _gpus(self) -> dict[str, str]:
        command = shutil.which("nvidia-smi")
        if command is None:
            return {}
        asked = ["--query-gpu=index,utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run([command, *asked], capture_output=True, text=True, timeout=5, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return {}
        rows = (row for row in csv.reader(told.splitlines(), skipinitialspace=True) if len(row) == 4)
        return {f"GPU {index}": f"{busy} %, {used} of {total} MiB" for index, busy, used, total in rows}
