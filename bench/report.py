"""The results: JSON a suite and machine in bench/results/, rows of a table, and the pages that are made of it.

bench/RESULTS.md has the contests of all machines; a study has a page of its own. Every page says by which command, at
which commit, when and on what its numbers were made.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.harness.measure import RESULTS, ROOT
from bench.harness.study import Table

REMARKS = "\n## What it says\n"
"""What a person adds to a study's page below this stays when the page is written anew."""
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "liger-kernel",
    "textbrewer",
    "torchdistill",
    "mabwiser",
    "SMPyBandits",
)
TOLD = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
"""What keeps torch and oneDNN to fewer instructions than the CPU has."""
CLOCKS = {"wall": "wall-clock seconds", "cpu": "CPU seconds, since other work shared the machine"}
HEADER = ("what", "who", "time", "time, ratio", "extra memory", "extra, ratio", "process peak", "peak, ratio")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, the versions, the commit and the date."""
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor() + _told(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return about | {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return about | {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 1),
    }


DIRTY = "-dirty"


def commit(root: Path = ROOT) -> str:
    """The commit that a tree is at, `DIRTY` behind it where more than the results of this command has changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ".", ":!bench/results", ":!bench/*.md")
    return git("describe", "--always") + (DIRTY if changed else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = dict(re.findall(r"^(model name|cpu family)\s*: (.*)$", information.read_text(), re.MULTILINE))
        if "model name" in names:
            return f"{names['model name']} (family {names.get('cpu family', '?')})"
    return platform.processor() or "CPU"


def _told() -> str:
    """Which instructions libraries were told to keep to, so that those results do not take the place of others."""
    told = [f"{name}={os.environ[name]}" for name in TOLD if name in os.environ]
    return f" told {', '.join(told)}" if told else ""


def write(suite: str, about: Mapping[str, Any], folder: Path = RESULTS, **found: list[Any]) -> Path:
    """bench/results/<device>/<suite>.json; found: "contests" and their "growth", or "tables"."""
    path = folder / re.sub("[^a-z0-9]+", "-", about["device"].lower()).strip("-") / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"suite": suite, "about": about, **found}, indent=1) + "\n")
    return path


def rows_of(contest: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """The table's rows, one a contender, in the order of `HEADER`."""
    for name, row in contest["rows"].items():
        if "seconds" not in row:
            yield (contest["name"], name, row["note"], *[""] * (len(HEADER) - 3))
            continue
        ratios = row["ratios"]
        cells = [_seconds(row["seconds"]), _ratio(ratios.get("time"))]
        for quantity in ("extra", "peak"):
            cells += [f"{row[quantity]:.0f} MiB" if quantity in row else "", _ratio(ratios.get(quantity))]
        yield (contest["name"], name, *cells)


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1f}"


def bars_of(contest: Mapping[str, Any]) -> Iterable[str]:
    """One line a bar: what was asked for and what was reached."""
    words = {"time": "time", "extra": "extra memory", "peak": "peak memory of the process"}
    for bar in contest["bars"]:
        if bar["reached"] is None:
            continue
        verdict = "met" if bar["reached"] <= bar["at_most"] else "MISSED"
        yield (
            f"{verdict}: {contest['name']}: {bar['contender']} takes {bar['reached']:.3f} of the "
            f"{words[bar['quantity']]} of {bar['against']}, at most {bar['at_most']:.3f} asked for"
        )


def ahead_of(contest: Mapping[str, Any]) -> Iterable[str]:
    """One line for each of the others that takes less time than we do for the same work."""
    ours = contest["rows"].get("optima", {}).get("seconds")
    for name, row in contest["rows"].items() if ours else ():
        other = name not in contest.get("unequal", ()) and "optima" not in name
        if other and row.get("seconds", ours) < ours:
            yield f"AHEAD OF US: {contest['name']}: {name} takes {row['seconds'] / ours:.3f} of our time"


def growth_of(found: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """Rows: what, axis and sizes, who, exponent of time, exponent of extra memory."""
    for name, exponents in found["exponents"].items():
        sizes = [f"{point['size']:g}" for point in found["points"][name]]
        values = ["" if value is None else f"{value:.2f}" for value in (exponents["time"], exponents["extra"])]
        yield (found["name"], f"{found['axis']} {', '.join(sizes)}", name, *values)


GROWTH_HEADER = ("what", "sizes", "who", "time grows as size to the", "extra memory as size to the")


def markdown(folder: Path = RESULTS) -> str:
    """All results that are there, machine by machine."""
    parts = [
        "# Measurements",
        "Written by `python -m bench`; every contender was first checked to give the same result. Ratios are to the "
        "first of each contest, in the same run: contenders take turns, the median counts. Extra memory is what the "
        "work needs beside its inputs, results included. What was not run on a GPU is not measured.",
    ]
    for machine in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []:
        suites = [json.loads(path.read_text()) for path in sorted(machine.glob("*.json"))]
        suites = [found for found in suites if "contests" in found]
        if suites:
            parts.append(f"## {suites[0]['about']['device']}")
        for found in suites:
            parts += _section(found)
    return "\n\n".join(parts) + "\n"


def provenance(suite: str, about: Mapping[str, Any]) -> str:
    """How, when, at which commit and with what a suite's numbers were made."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    where = (
        f"CUDA {about['cuda']}, {about['memory_gib']} GiB"
        if "cuda" in about
        else f"{about['threads']} of {about['cores']} cores, {about['instructions']}"
    )
    clock = f", {CLOCKS[about['clock']]}" if about.get("clock") == "cpu" or "cuda" not in about else ""
    return (
        f"`python -m bench --only {suite}`, {about['date'][:10]}, commit {about['commit']}, {where}{clock}; {versions}"
    )


def study_page(module: Any, suite: str, about: Mapping[str, Any], tables: Iterable[Table], before: str = "") -> str:
    """A study's page: its module's docstring, how it was made, its tables, and the remarks of the page before."""
    parts = [f"# {module.TITLE}", str(module.__doc__).strip(), f"{provenance(suite, about)}; {about['device']}"]
    for table in tables:
        parts += [f"## {table.name}", _table(table.header, table.rows)]
    _, separator, remarks = before.partition(REMARKS)
    return "\n\n".join(parts) + "\n" + separator + remarks


def _section(found: Mapping[str, Any]) -> list[str]:
    parts = [f"### {found['suite']}", provenance(found["suite"], found["about"])]
    rows = [row for contest in found["contests"] for row in rows_of(contest)]
    if rows:
        parts.append(_table(HEADER, rows))
    summary = [line for contest in found["contests"] for line in (*bars_of(contest), *ahead_of(contest))]
    if summary:
        parts.append("\n".join(f"- {line}" for line in summary))
    rates = [
        "- {name}: ours runs at {flops:.0f} GFLOP/s, {exps:.1f} Gexp/s, {bytes:.1f} GB/s".format(
            name=contest["name"], **contest["rates"]
        )
        for contest in found["contests"]
        if contest["rates"]
    ]
    if rates:
        parts.append("Work that the definition asks for, over our time:\n\n" + "\n".join(rates))
    grown = [row for sweep in found["growth"] for row in growth_of(sweep)]
    if grown:
        parts.append(_table(GROWTH_HEADER, grown))
    return parts


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(tuple(header)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
