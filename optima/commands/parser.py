"""The parser of a command's options, and its help in two levels."""

import argparse
import re
from typing import Any

from jsonargparse import ArgumentParser

from optima.commands import Command
from optima.recipes import recipes_of

HELP_ALL = "--help-all"


class _Parser(ArgumentParser):
    """One whose help names types as people do."""

    def format_help(self, *arguments: Any, **named: Any) -> str:
        return re.sub(r"<class\s+'(\w+)'>", r"\1", super().format_help(*arguments, **named))


def make_parser(name: str, command: Command, config: type[Any], whole: bool) -> ArgumentParser:
    """The parser of a command's words; whole: whether help shows every option, not only those that matter."""
    parser = _Parser(prog=f"optima {name}", description=command.summary, exit_on_error=False, allow_abbrev=False)
    recipes = ", ".join(recipes_of(command.recipes))
    named = f", or the name of a recipe: {recipes}" if recipes else ""
    parser.add_argument("--config", action="config", help=f"a YAML file of options{named}")
    parser.add_class_arguments(config, as_group=False)
    if command.matter and not whole:
        parser.epilog = f"optima {name} {HELP_ALL} shows every option."
        for action in parser._actions:
            if action.dest not in ("help", "config", *command.matter):
                action.help = argparse.SUPPRESS
    return parser
