"""README and the documentation: their commands are taken, their links lead somewhere, and nothing is left out."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from optima.commands import COMMANDS
from optima.commands.parse import parse
from optima_core.bandit import POLICIES

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def commands_of(page: Path) -> list[str]:
    """The lines that a reader may type, in the order of the page."""
    found = []
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language in ("", "sh", "bash", "console"):
            lines = [line.removeprefix("srun ") for line in block.replace("\\\n", " ").splitlines()]
            found += [line for line in lines if re.match(r"(optima|torchrun|python|pip|mkdocs)\b", line)]
    return found


SHELL = [(page, line) for page in PAGES for line in commands_of(page)]


def test_the_pages_show_commands() -> None:
    assert len(SHELL) > 30


@pytest.mark.parametrize(("page", "line"), SHELL, ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_shown_command_is_one_that_the_program_takes(
    page: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("distill", "uniform", "vqa"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    for part in re.split(r" && ", line):
        words = [
            word
            for word in shlex.split(part.partition(" >> ")[0], comments=True)
            if not re.fullmatch(r"\$\{\w+\[@]\}", word)
        ]
        if "-m" in words and words[0] == "torchrun":
            words = ["optima", *words[words.index("optima.run") + 1 :]]
        if words[0] == "optima" and {"--help", "help", "--completion"} & set(words):
            with pytest.raises(SystemExit):
                parse(words[1:])
            assert capsys.readouterr().out
        elif words[0] == "optima":
            parse(words[1:])
        elif words[:2] == ["python", "-m"]:
            assert find_spec(words[2]) is not None
        elif words[:2] == ["pip", "install"]:
            refuse_what_cannot_be_installed(words)


SCRIPTS = [
    (page, block) for page in PAGES for language, block in BLOCK.findall(page.read_text("utf-8")) if language == "bash"
]


@pytest.mark.parametrize(
    ("page", "script"), SCRIPTS, ids=lambda value: "script" if isinstance(value, str) else value.name
)
def test_a_shown_script_is_one_that_bash_reads(page: Path, script: str) -> None:
    read = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


def test_nobody_is_sent_to_a_package_index_for_what_is_not_there() -> None:
    """OPTIMA is installed from a clone; hints name packages that exist."""
    for folder in ("optima", "core", "kernels", "docs", "examples", "README.md", "Dockerfile"):
        for path in [ROOT / folder, *(ROOT / folder).rglob("*")]:
            if path.suffix in (".py", ".md", "") and path.is_file():
                assert not re.search(r"pip install[^\n]*optima-", path.read_text(encoding="utf-8")), path


def test_the_three_distributions_agree_in_their_torch_and_say_why_it_ends_there() -> None:
    wanted = set()
    for folder in (".", "core", "kernels"):
        text = (ROOT / folder / "pyproject.toml").read_text(encoding="utf-8")
        wanted |= {need for need in tomllib.loads(text)["project"]["dependencies"] if need.startswith("torch")}
        assert "# torch 2.14 brings Triton 3.8" in text
    assert len(wanted) == 1


def refuse_what_cannot_be_installed(words: list[str]) -> None:
    """Folders that hold no distribution, and extras that none has."""
    for word in words:
        if word.startswith("./"):
            assert (ROOT / word.partition("[")[0] / "pyproject.toml").is_file(), word
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8") + (ROOT / "kernels/pyproject.toml").read_text("utf-8")
    for word in words:
        for name in re.findall(r"\[([\w,]+)]", word):
            for extra in name.split(","):
                assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_readme_is_read_in_one_go() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize(
    ("package", "page"),
    [
        ("optima", "optima"),
        ("optima_core", "optima_core"),
        ("optima_core.bandit", "bandit"),
        ("optima_kernels", "optima_kernels"),
    ],
)
def test_the_reference_lists_every_public_name(package: str, page: str) -> None:
    text = (ROOT / "docs/reference" / f"{page}.md").read_text(encoding="utf-8")
    for name in import_module(package).__all__:
        assert re.search(rf"^::: {package}\.{name}$", text, re.MULTILINE) or f"`{package}.{name}`" in text, name


def test_every_command_and_policy_is_in_the_documentation() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for command in COMMANDS:
        assert re.search(rf"optima {command}\b|`{command}`", text), command
    for policy in POLICIES:
        assert f"`{policy}`" in text, policy


@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="needs the packages of the extra docs")
def test_the_documentation_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [shutil.which("mkdocs") or "", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "attention_map_loss" in (tmp_path / "site/reference/optima_kernels/index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["optima_kernels", "optima_core"])
def test_losses_and_engine_need_what_they_say(package: str) -> None:
    """Nothing else that OPTIMA depends on may be imported with their names: torch, and safetensors by the engine."""
    others = ["matplotlib", "PIL", "jsonargparse", "yaml", "rich", "jinja2", "tokenizers", "optima"]
    others += ["safetensors"] if package == "optima_kernels" else []
    code = f"import sys\nfor name in {others}: sys.modules[name] = None\nfrom {package} import *"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "core", ROOT / "kernels")))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
