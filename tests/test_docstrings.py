"""What docstrings say of a class's fields, and of the models that are shipped by name, is so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from optima.coca.presets import PRESETS

ROOT = Path(__file__).parent.parent
FILES = [file for package in ("optima", "core", "kernels") for file in sorted((ROOT / package).rglob("*.py"))]


def listed(docstring: str) -> set[str]:
    """The names under "Attributes:", each before a colon in a line of its own."""
    section = docstring.split("Attributes:", 1)[1]
    lines = re.findall(r"^    ([a-z_][\w, ]*): ", section, re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


def fields_of(node: ast.ClassDef) -> set[str]:
    names = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]
    return {name for name in names if not name.startswith("_")}


def classes() -> Iterator[tuple[str, set[str], set[str]]]:
    """Of every class whose docstring lists its fields: its name, those, and the fields that it has."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "Attributes:" in (docstring := ast.get_docstring(node) or ""):
                yield f"{file.stem}.{node.name}", listed(docstring), fields_of(node)


@pytest.mark.parametrize(("name", "told", "fields"), [pytest.param(*each, id=each[0]) for each in classes()])
def test_every_field_is_listed_and_nothing_else(name: str, told: set[str], fields: set[str]) -> None:
    assert told == fields


def test_models_that_are_spoken_of_by_name_are_there() -> None:
    spoken = {name for file in FILES for name in re.findall(r"`([\w-]+)` models", file.read_text(encoding="utf-8"))}
    assert spoken <= set(PRESETS)
