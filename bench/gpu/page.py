"""The page of a run on a GPU, and the lines that are kept for it.

    python -m bench.gpu.page DIR/gpu.jsonl ...

Puts the lines of these files, the last of every item, into bench/results/gpu-<device>.jsonl beside what is there,
random problems of a group as one line, and renders bench/GPU.md from all of it. Lines made by other code than the last
are marked.
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import lines
from bench.gpu.lines import GROUP, ROOT, Line

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "bench" / "GPU.md"
TIMED = ("kernels", "step")


def lines_of(files: Sequence[Path]) -> list[Line]:
    """Every whole line; a machine that went away may have cut one off."""
    return [line for file in files if file.exists() for line in lines.parsed(file.read_text())]


def compact(found: Iterable[Line]) -> list[Line]:
    """The last line of every item; of correctness, one a group with its counts, and one for everything wrong."""
    last: dict[tuple[str, str, str], Line] = {}
    for line in found:
        key = (line["part"], line["group"], line["item"])
        last.pop(key, None)  # so that the order is that of the last lines
        last[key] = line
    kept = [line for line in last.values() if (line["part"] in TIMED and line["item"] != GROUP) or "about" in line]
    for name in dict.fromkeys(group for part, group, _ in last if part == "correctness"):
        of_group = [line for (part, group, _), line in last.items() if (part, group) == ("correctness", name)]
        kept += _counted(name, [line for line in of_group if "about" not in line])
    return kept


def _counted(name: str, found: Sequence[Line]) -> list[Line]:
    """A group's counts and what is wrong. Where nothing but an earlier count is there, that is kept."""
    items = [line for line in found if line["item"] != GROUP]
    right = [line for line in items if line["ok"]]
    if not right:
        return [line for line in found if line["item"] != GROUP or "of" in line]
    code = items[-1]["code"]
    items, right = ([line for line in some if line["code"] == code] for some in (items, right))
    errors = [line["error"] for line in right if isinstance(line.get("error"), float)]
    counts = {"of": len(items), "right": len(right), "error": max(errors, default=None)}
    place = {"part": "correctness", "group": name, "item": GROUP, "code": code, "ok": len(items) == len(right)}
    return [place | counts, *(line for line in items if not line["ok"])]


def markdown(found: Sequence[Line]) -> str:
    """What the lines say."""
    code = found[-1]["code"]
    about = [line["about"] for line in found if "about" in line]
    rows = ["# On a GPU", "", "Measured by `python bench/run_on_gpu.py`, rendered by `python -m bench.gpu.page`.", ""]
    rows += [f"- {_machine(each)}" for each in about[-1:]]
    rows += [
        "- Times are milliseconds of a loss with its gradients, bf16: a replay of a CUDA graph, which is the GPU's"
    ]
    rows += [
        "  own time; a call by the wall's clock, back to back; and the host's until the call returns. TFLOP/s count"
    ]
    rows += [
        "  the products that the definition asks for. Memory is what a call needs at its peak beyond what lay there."
    ]
    rows += ["- Rows with * were measured with earlier code.", "", "## Right", ""]
    rows += ["| group | right | of | largest relative error |", "| --- | --- | --- | --- |"]
    rows += list(_correctness(found, code))
    wrong = [f"- {line['group']}, {line['item']}: {line.get('error', '')}" for line in found if _is_wrong(line)]
    rows += ["", "Wrong:", "", *wrong] if wrong else ["", "Nothing was wrong."]
    rows += ["", "## Times", "", "| what | who | GPU | call | host | TFLOP/s | TB/s | memory, MiB | note |"]
    rows += ["|" + " --- |" * 9, *_times(found, code), "", "## Dearest kernels of ours, microseconds x launches", ""]
    rows += list(_kernels(found))
    return "\n".join(rows) + "\n"


def _is_wrong(line: Line) -> bool:
    return not line["ok"] and line["item"] != GROUP


def _machine(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    rest = f"ptxas {about.get('ptxas')}; driver and clocks {about.get('driver')}; {about['date']}"
    return f"{about['device']}, {versions}, {rest}"


def _correctness(found: Sequence[Line], code: str) -> Iterator[str]:
    for line in found:
        if "of" in line:
            mark = "" if line["code"] == code else " *"
            error = "" if line.get("error") is None else f"{line['error']:.1e}"
            yield f"| {line['group']}{mark} | {line['right']} | {line['of']} | {error} |"


def _times(found: Sequence[Line], code: str) -> Iterator[str]:
    timed = [line for line in found if line["part"] in TIMED and "wall" in line]
    # Contenders of one shape stand together, ours first.
    shapes = list(dict.fromkeys(line["item"].split(" | ")[0] for line in timed))
    for line in sorted(timed, key=lambda line: shapes.index(line["item"].split(" | ")[0])):
        what, _, who = line["item"].partition(" | ")
        mark = "" if line["code"] == code else " *"
        cells = [what + mark, who, _number(line.get("graph")), _number(line["wall"]), _number(line.get("host"))]
        cells += [_number(line.get("tflops"), 0), _number(line.get("tbytes"), 2), _number(line.get("extra_mib"), 0)]
        yield "| " + " | ".join([*cells, line.get("note", "")]) + " |"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _kernels(found: Sequence[Line]) -> Iterator[str]:
    for line in found:
        if line.get("kernels"):
            names = (f"{name.strip()} {seconds:.0f} x {count}" for name, (seconds, count) in line["kernels"].items())
            yield f"- {line['item'].removesuffix(' | optima')}: {'; '.join(list(names)[:7])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="gpu.jsonl of runs, the latest last")
    options = parser.parse_args()
    found = lines_of(options.files)
    device = next((line["about"]["device"] for line in reversed(found) if "about" in line), None)
    if device is not None:
        kept = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"
        found = compact([*lines_of([kept]), *found])
        kept.write_text("".join(json.dumps(line) + "\n" for line in found))
        print(f"wrote {kept}")
    for file in sorted(RESULTS.glob("gpu-*.jsonl")):
        PAGE.write_text(markdown(lines_of([file])))
        print(f"wrote {PAGE} from {file.name}")


if __name__ == "__main__":
    main()
