"""From words on a command line to a typed configuration: YAML recipes, overrides, and errors that teach."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from optima.limits import MAX_CONFIG_BYTES, MAX_SHOWN_CHARACTERS
from optima.plain_yaml import load_yaml, refuse_hostile_yaml
from optima.untrusted import read_file, shown
from optima_core.errors import OptimaError

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does in a line, its configuration, and the function that runs it.

    bare: the option, a list, that words without an option's name before them go to, if the command takes such words.
    """

    summary: str
    config: type[Any]
    run: Callable[[Any], None]
    bare: str = ""


def parse(arguments: Sequence[str], commands: dict[str, Command], default: str) -> tuple[Command, Any]:
    """The command and its configuration; without a command's name the default one is meant.

    Raises OptimaError for unknown names (with the nearest known one), wrong types and values out of range.
    """
    words = list(arguments)
    if words and not words[0].startswith("-") and words[0] not in commands:
        raise OptimaError(f"unknown command {words[0]}; {_nearest(words[0], list(commands))}")
    if not words or (words[0] not in commands and words[0] not in ("-h", "--help")):
        words.insert(0, default)
    parser = ArgumentParser(
        prog="python -m optima.run",
        description=f"Distils multimodal models, module by module. Without a command: {default}.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND")
    parsers = {name: _command_parser(command) for name, command in commands.items()}
    for name, command in commands.items():
        subcommands.add_subcommand(name, parsers[name], help=command.summary)
    try:
        words = _with_values(_with_recipe_paths(words), parsers.get(words[0]))
        if words[0] in parsers:
            _refuse_hostile(words, _option_names(parsers[words[0]]))
        if words[0] in commands:
            words = [words[0], *_with_bare_words(words[1:], commands[words[0]].bare)]
        parsed = parser.parse_args(words)
        command_name = parsed.command
        command = commands[command_name]
        options = parsed[command_name].clone()
        options.pop("config", None)
        config = command.config(**parsers[command_name].instantiate(options).as_dict())
    except ArgumentError as error:
        known = _option_names(parsers[words[0]]) if words[0] in parsers else list(commands)
        raise OptimaError(_explain(str(error), known)) from error
    return command, config


def _command_parser(command: Command) -> ArgumentParser:
    parser = ArgumentParser(description=command.summary, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file, or the name of a shipped recipe: " + _recipes())
    parser.add_class_arguments(command.config, as_group=False)
    return parser


def _recipes() -> str:
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def _with_recipe_paths(words: list[str]) -> list[str]:
    """Replaces the name of a shipped recipe after --config by its path."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        option, separator, value = word.partition("=") if word.startswith("--config=") else ("", "", word)
        recipe = RECIPES / f"{value}.yaml"
        given = before == "--config" or separator
        if given and not Path(value).exists():
            if not recipe.exists():
                raise OptimaError(
                    f"config {value} is neither a file nor a shipped recipe; the recipes are {_recipes()}"
                )
            value = str(recipe)
        found.append(f"{option}{separator}{value}" if separator else value)
    return found


def _refuse_hostile(words: Sequence[str], options: Sequence[str]) -> None:
    """Raises OptimaError for values, and files of values, that would hold up whoever reads them."""
    groups = {"config"} | {name for name in options if any(other.startswith(f"{name}.") for other in options)}
    for before, word in zip(["", *words], words, strict=False):
        option, separator, value = word.partition("=")
        if not separator:
            option, value = before, word
        name = option.removeprefix("--")
        refuse_hostile_yaml(value, shown(name or "the command line", 80))
        if option.startswith("--") and name in groups and len(value) < MAX_SHOWN_CHARACTERS and Path(value).exists():
            _refuse_hostile_file(Path(value), groups, "" if name == "config" else f"{name}.")


def _refuse_hostile_file(path: Path, groups: set[str], prefix: str) -> None:
    try:
        text = read_file(path, "config", MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptimaError(f"config {path} is not UTF-8: {error.reason}") from error
    values = load_yaml(text, f"config {path}")
    for group in groups:
        found = values
        for part in group.removeprefix(prefix).split(".") if group.startswith(prefix) else ():
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, str) and found is not values:
            raise OptimaError(f"config {path}: {group} must be an object of options, got {found!r:.80}")


def _with_values(words: list[str], parser: ArgumentParser | None) -> list[str]:
    """Lets a true-or-false option stand alone: `--resume` means `--resume true`."""
    if parser is None:
        return words
    switches = {f"--{action.dest}" for action in parser._actions if getattr(action, "_typehint", None) is bool}
    return [
        f"{word}=true" if word in switches and after not in ("true", "false") else word
        for word, after in zip(words, [*words[1:], ""], strict=True)
    ]


def _with_bare_words(words: list[str], option: str) -> list[str]:
    """Gathers words that are neither options nor values of others into the list `option`: `report runs/a runs/b`."""
    bare: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_value = before.startswith("--") and "=" not in before and before != "--help"
        if before == f"--{option}" and not word.startswith("["):
            others.pop()
            bare.append(word)
        elif is_value or word.startswith("-") or not option:
            others.append(word)
        else:
            bare.append(word)
    return [*others, f"--{option}={json.dumps(bare)}"] if bare else others


def _option_names(parser: ArgumentParser) -> list[str]:
    return [option.lstrip("-") for action in parser._actions for option in action.option_strings]


def _explain(message: str, known: Sequence[str]) -> str:
    """jsonargparse's message in one line and in our words: the nearest known name, or the type that is wanted."""
    line = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments?: -*([\w.]+)", line) or re.search(
        r"does not accept (?:option|nested key) '([\w.]+)'", line
    )
    if unknown is not None:
        return f"unknown option {unknown.group(1)}; {_nearest(unknown.group(1), known)}"
    wrong = re.fullmatch(r'Parser key "([\w.]+)": Expected an? (.+?)\. Got value: (.*)', line) or re.fullmatch(
        r'Parser key "([\w.]+)": Does not validate .* Subtypes: \[(.+)\] Errors: .* Given value: (.*)', line
    )
    if wrong is None:
        return shown(line, 600)
    name, kind, value = wrong.groups()
    choices = [*re.findall(r"'([^']*)'", re.sub("<class '.*?'>", "", kind)), *(["null"] if "NoneType" in kind else [])]
    types = [found for found in re.findall(r"<class '([^']+)'>", kind) if found != "NoneType"]
    return f"{name} must be {' or '.join(types + choices)}, got {shown(value)}"


def _nearest(name: str, known: Sequence[str]) -> str:
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else "see --help for all of them"
