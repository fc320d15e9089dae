"""What the kept lines of runs on GPUs say, as Markdown: a section a card, the latest first.

A row is one line of a run. Ours stands beside every peer that was measured on the same card with the same inputs, and
every row in which a peer is ahead is named, by the GPU's own time, by the call's and by memory.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.gpu.context import Context
from bench.gpu.lines import GROUP, Line

TIMED = ("kernels", "step")
# No rivals: what anything is bound by, and the step that distils nothing.
BOUNDS = ("four products", "no distillation")
HEAD = """# On GPUs

Measured by `python bench/run_on_gpu.py`, rendered by `python -m bench.gpu.page`. Every number is of the card and the
commit that its section names.

- Times are milliseconds of a loss with its gradients, bf16. GPU: a replay of a CUDA graph, which is the GPU's own time.
  Call: by the wall's clock, back to back. Host: until the call returns. Where Host is near Call and above GPU, a caller
  waits for Python, not for the GPU.
- TFLOP/s count the products that the definition asks for. Memory is what a call needs at its peak beyond what lay
  there, and its share of eager torch's.
- "Four products" are the vendor's products alone, which nothing that stores logits can be faster than.
- Rows with * were measured with earlier code than the rest of their section.
"""


def markdown(cards: Sequence[Sequence[Line]]) -> str:
    """The page, of a list of lines a card."""
    latest_first = sorted(cards, key=lambda found: about(found)["date"], reverse=True)
    return "\n".join([HEAD, *("\n".join(_section(found)) for found in latest_first)]) + "\n"


def about(found: Sequence[Line]) -> dict[str, Any]:
    """What the last run said of its machine."""
    machine: dict[str, Any] = [line["about"] for line in found if "about" in line][-1]
    return machine


def _section(found: Sequence[Line]) -> Iterator[str]:
    machine, code = about(found), next(line["code"] for line in reversed(found) if "about" in line)
    yield f"## {machine['device']}, commit {machine.get('commit', 'unknown')}\n"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield f"{versions}, ptxas {machine.get('ptxas')}; driver and clocks {machine.get('driver')}; {machine['date']}\n"
    yield from (f"{line['text']}\n" for line in found if line["part"] == "remark")
    yield "### Right\n"
    yield "| group | right | of | largest relative error |\n| --- | --- | --- | --- |"
    yield from _correctness(found, code)
    wrong = list(_wrong(found))
    yield "\nWrong:\n" if wrong else "\nNothing was wrong.\n"
    yield from wrong
    yield "\n### Times\n"
    columns = "what | who | GPU | call | host | TFLOP/s | TB/s | memory, MiB | of eager's"
    yield f"| {columns} |\n|{' --- |' * 9}"
    timed = [line for line in found if line["part"] in TIMED and "wall" in line]
    yield from _times(timed, code)
    yield "\n### Where another is ahead\n"
    yield from list(_ahead(timed)) or ["Nowhere."]
    yield f"\n### Not measured here\n\n{'; '.join(not_measured(timed)) or 'Nothing.'}."
    yield "\n### Dearest kernels of ours, microseconds x launches\n"
    yield from _kernels(timed)
    yield ""


def _correctness(found: Sequence[Line], code: str) -> Iterator[str]:
    for line in found:
        if "of" in line:
            mark = "" if line["code"] == code else " *"
            error = "" if line.get("error") is None else f"{line['error']:.1e}"
            yield f"| {line['group']}{mark} | {line['right']} | {line['of']} | {error} |"


def _wrong(found: Sequence[Line]) -> Iterator[str]:
    """Items that failed alike on one line."""
    alike: dict[tuple[str, str], list[Line]] = {}
    for line in found:
        if not line["ok"] and line["item"] != GROUP:
            alike.setdefault((line["group"], re.sub(r"\d[\d.e+-]*", "#", str(line.get("error")))), []).append(line)
    for (group, _), some in alike.items():
        names = some[0]["item"] if len(some) == 1 else f"{len(some)} items, the first {some[0]['item']}"
        yield f"- {group}, {names}: {str(some[0].get('error', ''))[:160]}"


def _place(line: Line) -> tuple[str, str]:
    what, _, who = line["item"].partition(" | ")
    return what, who


def _shapes(timed: Sequence[Line]) -> dict[str, list[Line]]:
    """Contenders of one shape stand together, in the order in which the shapes came."""
    shapes: dict[str, list[Line]] = {}
    for line in timed:
        shapes.setdefault(_place(line)[0], []).append(line)
    return shapes


def _times(timed: Sequence[Line], code: str) -> Iterator[str]:
    for what, some in _shapes(timed).items():
        eager = next((_memory(line) for line in some if _place(line)[1] in ("eager", "usual way")), None)
        for line in some:
            mark, memory = "" if line["code"] == code else " *", _memory(line)
            share = "" if not eager or memory is None else f"{memory / eager:.3f}"
            cells = [what + mark, _place(line)[1], _number(line.get("graph")), _number(line["wall"])]
            cells += [_number(line.get("host")), _number(line.get("tflops"), 0), _number(line.get("tbytes"), 2)]
            yield "| " + " | ".join([*cells, _number(memory, 0), share]) + " |"


def _memory(line: Line) -> float | None:
    """None where a graph holds its memory from its capture on, so that a call takes none."""
    value: float | None = None if "CUDA graph" in line["item"] else line.get("extra_mib")
    return value


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _ahead(timed: Sequence[Line]) -> Iterator[str]:
    for what, some in _shapes(timed).items():
        ours = next((line for line in some if _place(line)[1] == "optima"), None)
        others = [line for line in some if not _place(line)[1].startswith(("optima", *BOUNDS)) and _place(line)[1]]
        for name, unit, value in (
            ("GPU", "ms", lambda line: line.get("graph")),
            ("call", "ms", lambda line: line["wall"]),
            ("memory", "MiB", _memory),
        ):
            mine = None if ours is None else value(ours)
            told = [f"{_place(line)[1]} {value(line):.3f}" for line in others if mine and (value(line) or mine) < mine]
            if told:
                yield f"- {what}, {name}: {', '.join(told)}; ours {mine:.3f} {unit}"


def not_measured(timed: Sequence[Line]) -> list[str]:
    """What the command would have timed, had there been time: shapes, or contenders of them."""
    from bench.gpu import kernels
    from bench.suites import whole_step

    context = Context(torch.device("cuda"), rehearse=False)
    names = [item.name for group in kernels.GROUPS.values() for item in group(context)]
    for contest in whole_step.contests(context.device):
        names += [f"{contest.name} | {name}" for name in contest.contenders]
    return [name for name in names if name not in {line["item"] for line in timed}]


def _kernels(timed: Sequence[Line]) -> Iterator[str]:
    for line in timed:
        if line.get("kernels") and _place(line)[1].startswith("optima"):
            names = (f"{name.strip()} {seconds:.0f} x {count}" for name, (seconds, count) in line["kernels"].items())
            yield f"- {line['item'].removesuffix(' | optima')}: {'; '.join(list(names)[:7])}"
