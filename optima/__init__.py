"""OPTIMA: distils a CoCa teacher into a small CoCa student, module by module.

`optima` on the command line is `optima.run`; in Python, `distill(DistillConfig(...))` is a run, and
`load_student("runs/distill")` its student. All of it is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optima.commands.distill import distill
    from optima.runs.config import DistillConfig
    from optima.runs.student import load_student

    __version__: str

__all__ = ["DistillConfig", "__version__", "distill", "load_student"]

_HOMES = {
    "DistillConfig": "optima.runs.config",
    "distill": "optima.commands.distill",
    "load_student": "optima.runs.student",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("optima-distill")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
