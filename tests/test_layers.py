"""The plan of the house: which package and which room may import which, read from the source and not from what runs."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import optima_kernels

ROOT = Path(__file__).parent.parent
PACKAGES = {"optima_kernels": ROOT / "kernels", "optima_core": ROOT / "core", "optima": ROOT}
"""Packages, lowest first, and where their folders are."""

ROOMS = {
    "limits": -1,
    "task": 0, "assets": 0, "recipes": 0, "plain_yaml": 0, "sizes": 0, "untrusted": 0,
    "data": 1, "coca": 1,
    "metrics": 2,
    "tasks": 3,
    "runs": 4,
    "report": 5, "simulate": 5,
    "commands": 6, "plan": 6,
    "": 7, "run": 7,
    "__main__": 8,
}  # fmt: skip
"""Rooms of `optima` and their floors: a room imports those of lower floors, and itself."""


class Import(NamedTuple):
    """`name` of `module`, or the module itself, as `importer` takes it; at_once: when it is imported itself."""

    importer: str
    module: str
    name: str
    at_once: bool


def modules_of(package: str) -> dict[str, Path]:
    """The modules of a package by dotted name."""
    found = {}
    for path in (PACKAGES[package] / package).rglob("*.py"):
        parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in modules_of(package).items()}


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_in(importer: str, nodes: list[ast.stmt], at_once: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, "", at_once)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer} imports relatively"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield Import(
                    importer, *((submodule, "") if submodule in MODULES else (str(node.module), alias.name)), at_once
                )
        else:
            now = at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_for_types(node)
            for block in ("body", "orelse", "finalbody", "handlers", "cases"):
                inner = getattr(node, block, [])
                yield from imports_in(importer, inner if isinstance(inner, list) else [], now)


IMPORTS = [
    found
    for name, path in MODULES.items()
    for found in imports_in(name, ast.parse(path.read_text(encoding="utf-8")).body, at_once=True)
    if found.module.split(".")[0] in PACKAGES
]


def package_of(module: str) -> str:
    return module.split(".")[0]


def room_of(module: str) -> str:
    """The room of a module of `optima`; "" is the package itself."""
    return f"{module}.".split(".")[1]


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 100
    assert len(IMPORTS) > 500
    assert any(not found.at_once for found in IMPORTS)


def test_packages_import_lower_ones_alone() -> None:
    order = list(PACKAGES)
    upward = [
        found for found in IMPORTS if order.index(package_of(found.module)) > order.index(package_of(found.importer))
    ]
    assert not upward


def test_every_room_has_its_floor() -> None:
    assert {room_of(name) for name in modules_of("optima")} <= set(ROOMS)


def test_rooms_import_those_of_lower_floors_alone() -> None:
    wrong = []
    for found in IMPORTS:
        if package_of(found.importer) == package_of(found.module) == "optima":
            ours, theirs = room_of(found.importer), room_of(found.module)
            if ours != theirs and ROOMS[theirs] >= ROOMS[ours] and found.module != "optima":
                wrong.append(found)
    assert not wrong


def test_what_everyone_may_import_of_the_package_itself_imports_nothing() -> None:
    assert not [found for found in IMPORTS if found.importer == "optima" and found.at_once]


def test_nothing_is_imported_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in IMPORTS:
        # The kernels' self-check runs the losses that ask for its verdict, and a package hands out what is in it when
        # asked to; elsewhere not even an import within a function closes a circle.
        late = package_of(found.importer) == "optima_kernels" or found.importer in PACKAGES
        if (found.at_once or not late) and found.module != found.importer:
            graph[found.importer].add(found.module)
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_of_the_kernels_others_take_what_they_publish() -> None:
    published = {"optima_kernels", "optima_kernels.reference"}
    examined = {"optima_kernels.shared.selfcheck", "optima_kernels.shared.dispatch"}
    hidden = [
        found
        for found in IMPORTS
        if package_of(found.module) == "optima_kernels" != package_of(found.importer)
        and found.module not in published | (examined if found.importer == "optima.commands.doctor" else set())
    ]
    assert not hidden
    names = {found.name for found in IMPORTS if found.module == "optima_kernels" != package_of(found.importer)}
    assert names <= set(optima_kernels.__all__)


def test_nothing_private_crosses_a_package() -> None:
    private = [
        found
        for found in IMPORTS
        if package_of(found.importer) != package_of(found.module)
        and any(part.startswith("_") and part != "__version__" for part in [*found.module.split("."), found.name])
    ]
    assert not private


def test_nothing_private_crosses_a_room() -> None:
    private = [
        found
        for found in IMPORTS
        if package_of(found.importer) == package_of(found.module) == "optima"
        and room_of(found.importer) != room_of(found.module)
        and found.name.startswith("_")
        and found.name != "__version__"
    ]
    assert not private
