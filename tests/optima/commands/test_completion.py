"""A shell completes commands, options, values and names of files from the script that `--completion` prints."""

import shutil
import subprocess
from pathlib import Path

import pytest

from optima.commands import COMMANDS
from optima.run import main
from optima_core.bandit import POLICIES


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from optima.commands.completion import completion_script

    pytest.importorskip("shtab")
    path = tmp_path_factory.mktemp("completion") / "optima.bash"
    path.write_text(completion_script("bash"))
    return path


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    shell = (
        'source "$0"; COMP_WORDS=(optima "$@"); COMP_CWORD=$#; COMP_TYPE=9; COMP_KEY=9; '
        '$(complete -p optima | grep -o "_[^ ]*" | head -1) optima "${COMP_WORDS[COMP_CWORD]}" ""; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = subprocess.run(
        ["bash", "-c", shell, str(script), *words], capture_output=True, text=True, check=False, cwd=script.parent
    )
    return {line.strip() for line in found.stdout.splitlines()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_values_and_files(script: Path) -> None:
    (script.parent / "a_run").mkdir()
    assert set(COMMANDS) <= completed(script, "")
    assert completed(script, "comp") == {"compare", "compare_hf"}
    assert completed(script, "distill", "--engine.bandit.po") == {"--engine.bandit.policy"}
    assert completed(script, "distill", "--task", "") >= {"captioning", "vqa", "nlvr2", "snli_ve"}
    assert completed(script, "distill", "--engine.bandit.policy", "") >= set(POLICIES)
    assert completed(script, "report", "a_") == {"a_run"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_script_is_printed_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit):
        main(["--completion", shell])
    assert "--engine.bandit.policy" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["fish"], []])
def test_an_unknown_shell_is_a_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", *words]) == 2
    assert "bash, zsh, tcsh" in capsys.readouterr().err
