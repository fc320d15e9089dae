"""What the lines of a run say, short enough for a terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu import lines
from bench.gpu.lines import Line
from bench.gpu.plan import Group


def summary(out: Path, code: str, groups: Sequence[Group]) -> tuple[str, int]:
    """The text, and the exit status: 1 wrong, 3 missing, 0 neither."""
    found = lines.of_code(out, code)
    names = [(group.part, group.name) for group in groups]
    mine = {key: line for key, line in found.items() if key[:2] in names}
    wrong = [(key, line) for key, line in mine.items() if not line["ok"]]
    missing = [f"{key[1]}: {line['left']}" for key, line in mine.items() if line.get("left")]
    missing += [f"{name}: never ran" for part, name in names if not any(key[:2] == (part, name) for key in mine)]
    rows = [*_versions(mine), *_correct(mine, names), *_times(mine), *_notes(mine)]
    rows += [f"WRONG {'/'.join(key)}: {line.get('error', '')}" for key, line in wrong]
    rows += [f"MISSING {text}" for text in missing]
    rows.append(f"{len(mine)} items, {len(wrong)} wrong, {len(missing)} groups with something missing")
    return "\n".join(rows), 1 if wrong else 3 if missing else 0


def _versions(mine: dict[tuple[str, str, str], Line]) -> Iterator[str]:
    for line in mine.values():
        if "about" in line:
            about = line["about"]
            versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
            yield f"{about['device']}, {versions}, ptxas {about.get('ptxas')}, {about.get('driver')}"


def _correct(mine: dict[tuple[str, str, str], Line], names: Sequence[tuple[str, str]]) -> Iterator[str]:
    for part, name in names:
        if part != "correctness":
            continue
        of_group = [line for key, line in mine.items() if key[:2] == (part, name) and key[2] != lines.GROUP]
        worst = max((line.get("error", 0.0) for line in of_group if line["ok"] and line.get("error")), default=0.0)
        right = sum(line["ok"] for line in of_group)
        yield f"{name}: {right} of {len(of_group)} right, largest relative error {worst:.1e}"


def _times(mine: dict[tuple[str, str, str], Line]) -> Iterator[str]:
    for (part, _, item), line in mine.items():
        if part in ("kernels", "step") and "wall" in line:
            graph = line.get("graph")
            cells = [
                f"{item:58}",
                "graph      -   " if graph is None else f"graph {graph:8.3f}",
                f"wall {line['wall']:8.3f}",
            ]
            cells += [f"host {line['host']:7.3f}"] if "host" in line else []
            cells += [f"{line[name]:7.1f} {name}" for name in ("tflops", "tbytes") if name in line]
            cells += [f"{line['extra_mib']:7.0f} MiB"] if "extra_mib" in line else []
            yield " ".join(cells)


def _notes(mine: dict[tuple[str, str, str], Line]) -> Iterator[str]:
    for (_, group, item), line in mine.items():
        if line["ok"] and line.get("note") and line["note"] != "a rehearsal":
            yield f"note {group}/{item}: {line['note']}"
