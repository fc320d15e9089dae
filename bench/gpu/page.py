"""The page of runs on GPUs, and the lines that are kept for it.

    python -m bench.gpu.page [DIR/gpu.jsonl ...] [--commit HASH] [--remark TEXT]

Puts the lines of these files, the last of every item, into bench/results/gpu-<device>.jsonl beside what is there,
random problems of a group as one line, and renders bench/GPU.md from the files of all devices. `--commit` names the
commit whose code ran, where the machine held a copy that did not know; `--remark` adds a sentence of a person.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import lines
from bench.gpu.lines import GROUP, ROOT, Line
from bench.gpu.tables import TIMED, markdown

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "bench" / "GPU.md"


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
    kept += [line for line in last.values() if line["part"] == "remark"]
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


def named(found: Sequence[Line], commit: str | None, remark: str | None) -> list[Line]:
    """With the commit in what is told of the machine, and the remark."""
    told: list[Line] = []
    for line in found:
        about: dict[str, Any] = line.get("about", {}) | ({} if commit is None else {"commit": commit})
        told.append(line | {"about": about} if "about" in line else line)
    if remark is not None:
        place = {"part": "remark", "group": "remark", "item": remark[:20], "ok": True, "code": found[-1]["code"]}
        told.append(place | {"text": remark})
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="gpu.jsonl of runs, the latest last")
    parser.add_argument("--commit", help="whose code ran")
    parser.add_argument("--remark", help="a sentence for the page")
    options = parser.parse_args()
    found = lines_of(options.files)
    device = next((line["about"]["device"] for line in reversed(found) if "about" in line), None)
    if device is not None:
        kept = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"
        found = compact([*lines_of([kept]), *named(found, options.commit, options.remark)])
        kept.write_text("".join(json.dumps(line) + "\n" for line in found))
        print(f"wrote {kept}")
    files = sorted(RESULTS.glob("gpu-*.jsonl"))
    PAGE.write_text(markdown([lines_of([file]) for file in files]))
    print(f"wrote {PAGE} from {', '.join(file.name for file in files)}")


if __name__ == "__main__":
    main()
