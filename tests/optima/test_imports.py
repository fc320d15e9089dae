"""What data, CoCa and tasks import: no circles, and configurations without anything heavy."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import optima

ROOT = Path(optima.__file__).parent
LIGHT = ("optima.task", "optima.data.config", "optima.coca.config", "optima.coca", "optima.tasks", "optima.data")
HEAVY = ("torch", "numpy", "PIL", "tokenizers", "rich", "optima_core", "optima_kernels")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules that a file imports anywhere, within functions, too; those for type checkers alone as well."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_no_module_of_data_coca_and_tasks_imports_itself_by_a_detour() -> None:
    paths = [path for folder in ("data", "coca", "tasks", "metrics") for path in (ROOT / folder).rglob("*.py")]
    modules = {name_of(path): path for path in [*paths, ROOT / "task.py"]}
    graph = {name: imported(ast.parse(path.read_text("utf-8")), set(modules)) for name, path in modules.items()}
    assert sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", LIGHT)
def test_configurations_are_imported_without_anything_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_needs_torch_is_found_in_coca_and_nothing_else_is() -> None:
    import optima.coca
    import optima.coca.model

    assert optima.coca.CoCa is optima.coca.model.CoCa
    assert all(hasattr(optima.coca, name) for name in optima.coca.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        optima.coca.nothing  # noqa: B018
