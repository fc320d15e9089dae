"""Numbers as the report prints them."""

import math

from optima.task import TASKS, title_on

ABSENT = "–"


def task_title(task: str, data: str = "pictograms") -> str:
    """A task on a data set; another name, such as that of a mean over tasks, in words."""
    return title_on(task, data) if task in TASKS else spelled(task).capitalize()


def spelled(name: str) -> str:
    """An identifier as words: "image_encoder" -> "image encoder", "a+b" -> "a + b", "a/b" -> "a: b"."""
    return name.replace("+", " + ").replace("_", " ").replace("/", ": ")


def label(name: str, most: int = 30) -> str:
    """A name as a plot has room for it: words, cut short where they would crowd the drawing out."""
    text = spelled(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def is_percentage(metric: str) -> bool:
    """Whether a metric is in per cent, as all accuracies of this package are; any other is a plain number."""
    return "accuracy" in metric


def score(metric: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:.1f}%" if is_percentage(metric) else plain(value)


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
