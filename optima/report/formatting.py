"""Numbers as the report prints them."""

from __future__ import annotations

import math
from collections.abc import Iterable

TASKS = {
    "captioning": "Captioning",
    "vqa": "Visual question answering",
    "nlvr2": "Statements about two pictures (NLVR2-shaped)",
    "snli_ve": "Visual entailment (SNLI-VE-shaped)",
}
ABSENT = "–"
# Metrics that may fall within 0..1 without being a share of anything.
NOT_A_SHARE = ("loss", "perplexity", "cider", "nll", "entropy")


def task_title(task: str) -> str:
    return TASKS.get(task, words(task).capitalize())


def words(name: str) -> str:
    """An identifier as words: "image_encoder" -> "image encoder", "a+b" -> "a + b"."""
    return name.replace("+", " + ").replace("_", " ")


def label(name: str, most: int = 30) -> str:
    """A name as a plot has room for it: words, cut short where they would crowd the drawing out."""
    text = words(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def is_share(metric: str, values: Iterable[float]) -> bool:
    """Whether a metric reads best as a percentage: all its values lie within 0..1 and its name is no loss."""
    return not any(word in metric.lower() for word in NOT_A_SHARE) and all(0 <= value <= 1 for value in values)


def score(value: float | None, share: bool) -> str:
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{100 * value:.1f}%" if share else plain(value)


def plain(value: float) -> str:
    """Three significant digits, no exponent for everyday sizes."""
    if not math.isfinite(value):
        return ABSENT
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}".replace("-", "−")


def count(value: float) -> str:
    """A number of parameters: 812, 41.3k, 1.20M, 3.52B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{plain(value / size)}{unit}"
    return f"{value:.0f}"


def factor(value: float) -> str:
    return f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(mib: float) -> str:
    if not math.isfinite(mib):
        return ABSENT
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"
