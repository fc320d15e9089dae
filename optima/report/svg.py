"""Matplotlib figures as inline SVG that follows the page's theme.

A figure is drawn in marker colours, one per role of the palette, and each marker then becomes a CSS variable. So one
drawing is right in light and dark, and the colours live in one place, the style sheet. Text stays text: it takes the
page's font, can be selected, and is never traced into paths.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

ARM_COLOURS = 8
HEAT_LEVELS = 10
RISE_LEVELS = 4
ROLES = (
    "ink",
    "muted",
    "grid",
    "surface",
    "teacher",
    "before",
    "after",
    *(f"arm-{i}" for i in range(ARM_COLOURS)),
    *(f"heat-{i}" for i in range(HEAT_LEVELS)),
    *(f"rise-{i}" for i in range(RISE_LEVELS)),
)
_MARKER = "#f00d"
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 12.0,
    "axes.titlesize": 12.5,
    "axes.labelsize": 11.5,
    "xtick.labelsize": 11.0,
    "ytick.labelsize": 11.0,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Layout:
    """The room a plot gets: CSS pixels at scale one, and whether it is the phone's version."""

    width: int
    compact: bool


WIDE = Layout(width=980, compact=False)
NARROW = Layout(width=340, compact=True)


def colour(role: str) -> str:
    """The marker colour of a palette role, for use as a matplotlib colour.

    Raises:
        ValueError: the role is not in the palette.
    """
    return f"{_MARKER}{ROLES.index(role):02x}"


def arm_colour(index: int) -> str:
    return colour(f"arm-{index % ARM_COLOURS}")


def inline(draw: Callable[[Layout], Figure], name: str, label: str) -> Markup:
    """Draws a plot for wide and for narrow windows; the style sheet shows one of them.

    Args:
        draw: makes the figure, `figsize` in units of 72 CSS pixels.
        name: unique on the page; keeps the drawings' internal ids apart, and makes them the same every time.
        label: what a reader who cannot see the plot should know.
    """
    parts = []
    for layout, kind in ((WIDE, "wide"), (NARROW, "narrow")):
        with matplotlib.rc_context({**_RC, "svg.hashsalt": f"{name}-{kind}"}):
            parts.append(Markup('<div class="plot-{}">{}</div>').format(kind, _svg(draw(layout), label)))
    return Markup("").join(parts)


def _svg(figure: Figure, label: str) -> Markup:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    found = re.search(r'<svg[^>]*viewBox="([^"]+)"[^>]*>(.*)</svg>', buffer.getvalue(), re.DOTALL)
    assert found is not None
    body = re.sub(r"<style.*?</style>", "", found[2], flags=re.DOTALL)
    body = re.sub(_MARKER + "([0-9a-f]{2})", lambda match: f"var(--{ROLES[int(match[1], 16)]})", body)
    # Safe: matplotlib escapes every text it writes, and nothing else in the drawing comes from the run.
    return Markup('<svg class="plot" viewBox="{}" role="img" aria-label="{}">{}</svg>').format(
        found[1],
        label,
        Markup(body),
    )
