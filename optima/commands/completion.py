"""`optima --completion SHELL`: the script that lets a shell complete commands, options and their values."""

from jsonargparse import ArgumentParser

from optima.commands import COMMANDS
from optima.commands.parser import make_parser
from optima_core.bandit import CATALOGUE
from optima_core.errors import OptimaError

SHELLS = ("bash", "zsh", "tcsh")


def completion_script(shell: str) -> str:
    """The script for `shell`, which reads it once at its start: nothing of ours runs while a person types.

    Raises OptimaError if the shell is not known, or the package shtab is missing.
    """
    if shell not in SHELLS:
        raise OptimaError(f"completion is for {', '.join(SHELLS)}, got {shell!r:.80}")
    try:
        import shtab
    except ImportError:
        raise OptimaError("completion needs the package shtab, which is not installed; `pip install shtab`") from None
    whole = ArgumentParser(prog="optima")
    commands = whole.add_subcommands(required=False)
    for name, command in COMMANDS.items():
        parser = make_parser(name, command, command.config(), whole=True)
        for action in parser._actions:
            if action.dest.endswith("bandit.policy"):
                action.choices = tuple(CATALOGUE)
        if command.bare:
            kind = shtab.DIRECTORY if command.bare == "run" else shtab.FILE
            parser.add_argument("words", nargs="*").complete = kind
        commands.add_subcommand(name, parser, help=command.summary)
    return str(whole.get_completion_script(f"shtab-{shell}"))
