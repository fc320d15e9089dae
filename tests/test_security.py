"""SECURITY.md says what is so: its table of limits is the code's, and what it names exists."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import optima.limits

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_table_of_limits_is_that_of_the_code() -> None:
    body = ast.parse((ROOT / "optima/limits.py").read_text(encoding="utf-8")).body[1:]
    expected = []
    for assignment, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(assignment, ast.Assign)
        assert isinstance(assignment.targets[0], ast.Name)
        assert isinstance(text, ast.Expr)
        name = assignment.targets[0].id
        said = " ".join(ast.literal_eval(text.value).split()).removesuffix(".")
        expected.append((name, f"{getattr(optima.limits, name):,}", said))
    assert re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (.*) \|$", TEXT, re.MULTILINE) == expected


def test_every_limit_is_used_somewhere() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "optima").rglob("*.py"))
    for name in vars(optima.limits):
        if name.isupper():
            assert len(re.findall(rf"\b{name}\b", code)) >= 3, f"{name} is defined, and never imported or used"


def test_the_files_that_it_names_are_there() -> None:
    for name in re.findall(r"(?:\(|python |`)((?:tests|optima)/[\w/.]+)", TEXT):
        assert (ROOT / name).exists(), name


def test_what_it_says_of_the_current_directory_is_so(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("print('run by mistake')\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for words, taken in (([], True), (["-P"], False)):
        command = [sys.executable, *words, "-c", "import yaml"]
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert ("run by mistake" in found.stdout) == taken
