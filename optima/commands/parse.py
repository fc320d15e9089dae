"""From words on a command line to a typed configuration: recipes, YAML files, overrides, and errors that teach."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Container, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError

from optima import __version__
from optima.commands import COMMANDS, DEFAULT, Command
from optima.commands.completion import completion_script
from optima.commands.parser import HELP_ALL, make_parser
from optima.limits import MAX_CONFIG_BYTES, MAX_SHOWN_CHARACTERS
from optima.plain_yaml import load_yaml, refuse_hostile_yaml
from optima.recipes import RECIPES, recipes_of
from optima.untrusted import read_file, shown
from optima_core.errors import OptimaError

_HELP = ("-h", "--help", "help")


def parse(arguments: Sequence[str]) -> tuple[Command, Any]:
    """The command and its configuration; without a command's name `distill` is meant.

    Raises OptimaError for unknown names (with the nearest known one), wrong types and values out of range, SystemExit
    after help, the version or a completion script, which are printed.
    """
    words = list(arguments)
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # a byte of another encoding
            raise OptimaError(f"words must be UTF-8, got {word!r:.80}")
    if words[:1] == ["--version"]:
        print(f"optima {__version__}")
        raise SystemExit(0)
    if words[:1] == ["--completion"]:
        print(completion_script(" ".join(words[1:])), end="")
        raise SystemExit(0)
    if words and words[0] in _HELP:
        if words[1:2] and words[1] in COMMANDS:
            words = [words[1], "--help"]
        else:
            print(_overview())
            raise SystemExit(0)
    name = DEFAULT if not words or words[0].startswith("-") else words.pop(0)
    if name not in COMMANDS:
        raise OptimaError(f"unknown command {name}; {_nearest(name, list(COMMANDS))}")
    command = COMMANDS[name]
    return command, _configured(name, command, ["--help"] if words == ["help"] else words)


def _configured(name: str, command: Command, words: list[str]) -> Any:
    config = command.config()
    # What help does not show, a printed configuration would leave out, too.
    parser = make_parser(name, command, config, whole=HELP_ALL in words or not {"--help", "-h"} & {*words})
    words = ["--help" if word == HELP_ALL else word for word in words]
    words = _with_bare_words(_with_values(_with_recipes(words, name, command), config), command.bare)
    if command.resumes:
        words = _with_own_config(words, config)
    _refuse_hostile(words, config)
    try:
        options = parser.parse_args(words).clone()
    except ArgumentError as error:
        raise OptimaError(_explain(str(error), _option_names(config))) from error
    options.pop("config", None)
    return _built(config, options.as_dict(), "")


def _overview() -> str:
    commands = "\n".join(f"  {name:10} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: optima [COMMAND] [OPTIONS]\n\n"
        f"Distils multimodal models, module by module. Without a command: {DEFAULT}.\n\n{commands}\n\n"
        "optima COMMAND --help explains its options, --help-all every one of them.\n"
        "--version prints the version, -v shows the traceback of an error; --completion bash (zsh, tcsh) prints the "
        "script\nthat completes words in that shell."
    )


def _built(config: type[Any], values: dict[str, Any], prefix: str) -> Any:
    """The dataclass of plain values. Raises OptimaError, which names the group of options, if it refuses them."""
    hints = get_type_hints(config)
    for name, value in values.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise OptimaError(f"{prefix}{name} must be a number that 64 bits hold, got {value!r:.80}")
    given = {
        name: _built(hints[name], value, f"{prefix}{name}.") if dataclasses.is_dataclass(hints[name]) else value
        for name, value in values.items()
    }
    try:
        return config(**given)
    except ValueError as error:
        raise OptimaError(_in_group(str(error), prefix, hints)) from error


def _in_group(message: str, prefix: str, names: Container[str]) -> str:
    """What a group of options says of one of them, with the option's whole name."""
    group = prefix[:-1].rpartition(".")[2] + "."
    if message.startswith(group):
        return prefix.removesuffix(group) + message
    if re.split(r"[ .]", message)[0] in names:
        return prefix + message
    return f"{prefix[:-1]}: {message}" if prefix else message


def _with_recipes(words: list[str], name: str, command: Command) -> list[str]:
    """Replaces the name of a recipe after --config by what it says."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        option, separator, value = word.partition("=") if word.startswith("--config=") else ("", "", word)
        if before == "--config" or separator:
            value = _config_word(value, name, command)
        found.append(f"{option}{separator}{value}")
    return found


def _config_word(value: str, name: str, command: Command) -> str:
    known = recipes_of(command.recipes)
    if value in known:
        return json.dumps(known[value].options())
    if os.path.isfile(value):
        return value
    if value in RECIPES:
        listed = f"the recipes of {name} are {', '.join(known)}" if known else f"{name} has no recipes"
        raise OptimaError(f"recipe {value} is one of `{RECIPES[value].command}`; {listed}")
    if known:
        raise OptimaError(
            f"config {shown(value)} is neither a file nor a recipe; the recipes of {name} are {', '.join(known)}"
        )
    raise OptimaError(f"config {shown(value)} is no file")


def _with_values(words: list[str], config: type[Any]) -> list[str]:
    """Lets `--resume` mean `--resume true`, and a list be a single word or several between commas."""
    leaves = dict(_leaves(config))
    switches = {f"--{name}" for name, hint in leaves.items() if hint is bool}
    lists = {
        f"--{name}" for name, hint in leaves.items() if any(get_origin(x) is list for x in (hint, *get_args(hint)))
    }
    found = []
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        option, separator, value = word.partition("=")
        if word in switches and after not in ("true", "false"):
            word = f"{word}=true"
        elif option in lists and separator:
            word = f"{option}={_listed(value)}"
        elif before in lists:
            word = _listed(word)
        found.append(word)
    return found


def _listed(value: str) -> str:
    return value if value.startswith("[") or value == "null" else json.dumps(value.split(","))


def _with_own_config(words: list[str], config: type[Any]) -> list[str]:
    """Puts the config.yaml of a run that is to be resumed before what the words say otherwise."""
    values = dict(_values(words))
    if values.get("resume") != "true":
        return words
    run = values.get("run")
    if run is None and "config" in values:
        text = values["config"]  # a file, or what a recipe says
        given = _file_values(Path(text)) if os.path.isfile(text) else load_yaml(text, "config")
        run = given.get("run") if isinstance(given, dict) else None
    own = Path(str(run)) / "config.yaml" if run is not None else config.run / "config.yaml"
    return ["--config", str(own), *words] if own.is_file() else words


def _refuse_hostile(words: Sequence[str], config: type[Any]) -> None:
    """Raises OptimaError for values, and files of values, that would hold up whoever reads them."""
    parts = [name.split(".") for name, _ in _leaves(config)]
    groups = {"config", *(".".join(part[:depth]) for part in parts for depth in range(1, len(part)))}
    for name, value in _values(words):
        refuse_hostile_yaml(value, shown(name, 80))
        if name in groups and len(value) < MAX_SHOWN_CHARACTERS and Path(value).exists():
            _refuse_files_within(_file_values(Path(value)), groups, "" if name == "config" else f"{name}.", value)


def _file_values(path: Path) -> Any:
    try:
        text = read_file(path, "config", MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptimaError(f"config {shown(path)} is not UTF-8: {error.reason}") from error
    return load_yaml(text, f"config {shown(path)}")


def _refuse_files_within(values: Any, groups: set[str], prefix: str, path: str) -> None:
    """Raises OptimaError where a file names another one in place of a group of options."""
    for group in groups:
        found = values
        for part in group.removeprefix(prefix).split(".") if group.startswith(prefix) else ():
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, str) and found is not values:
            raise OptimaError(f"config {shown(path)}: {group} must be an object of options, got {found!r:.80}")


def _values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options among the words, without their dashes, and their values."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--"):
            option, separator, value = word[2:].partition("=")
            yield option, value if separator else after


def _with_bare_words(words: list[str], option: str) -> list[str]:
    """Gathers words that are neither options nor values of others into the list `option`: `report runs/a runs/b`."""
    bare: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_value = before.startswith("--") and "=" not in before and before != "--help"
        if is_value or word.startswith("-") or not option:
            others.append(word)
        else:
            bare.append(word)
    if not bare:
        return others
    for place, word in enumerate(others[:-1]):
        if word == f"--{option}":  # `report --run runs/a runs/b`
            bare = [*_names(others[place + 1], option), *bare]
            del others[place : place + 2]
            break
    return [*others, f"--{option}={json.dumps(bare)}"]


def _names(text: str, option: str) -> list[Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, list):
            return found
    raise OptimaError(f"{option} must be names between brackets and commas, got {text!r:.80}")


def _leaves(config: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of all options, and their types."""
    for name, hint in get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, hint


def _option_names(config: type[Any]) -> list[str]:
    return ["config", "help", *(name for name, _ in _leaves(config))]


def _explain(message: str, known: Sequence[str]) -> str:
    """jsonargparse's message in one line and in our words: the nearest known name, or the type that is wanted."""
    line = " ".join(message.split())
    group = re.fullmatch(r"Group '([\w.]+)' does not accept option '([\w.]+)'", line)
    unknown = re.search(r"unrecognized arguments?: -*([\w.]+)", line) or re.match(r"Option '([\w.]+)'", line)
    if group is not None or unknown is not None:
        option = ".".join(group.groups()) if group is not None else unknown.group(1)  # type: ignore[union-attr]
        return f"unknown option {option}; {_nearest(option, known)}"
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
