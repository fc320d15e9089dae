"""Names of a package that are imported when they are asked for, so that its configurations load without torch."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def attributes_from(package: str, **modules: tuple[str, ...]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562): each name from that of the package's modules which is said to hold it."""
    homes = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find
