"""What commands print with: paths and names are shown as they are, whatever brackets they hold."""

from typing import Any

from rich.console import Console
from rich.table import Table


def make_console(**options: Any) -> Console:
    """A console that takes nothing for markup, and paints no numbers."""
    return Console(markup=False, highlight=False, **options)


def make_table(*headings: str, title: str | None = None, left: int = 1) -> Table:
    """A table whose first `left` columns are texts and whose others are numbers."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < left else "right")
    return table
