"""Where another page lies, as seen from this one: both may move together."""

import os
from pathlib import Path
from urllib.parse import quote


def address(target: Path, page: Path) -> str:
    """The relative address of a file for a link on `page`."""
    return quote(Path(os.path.relpath(target.resolve(), page.resolve().parent)).as_posix())
