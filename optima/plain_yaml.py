"""YAML without its traps: no aliases, which let a file of a few lines unpack to more than any memory, and no depth."""

from typing import Any

import yaml

from optima.limits import MAX_CONFIG_BYTES, MAX_NESTING
from optima_core.errors import OptimaError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def refuse_hostile_yaml(text: str, name: str) -> None:
    """Raises OptimaError if a text is too long, nested too deeply, or repeats parts of itself by aliases.

    Texts within it that are YAML again, as options in quotes may be, are looked at, too. What is no YAML at all passes:
    whoever reads it will say so.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise OptimaError(f"{name} has {len(text)} characters; {MAX_CONFIG_BYTES} are the most")
    depth, anchors = 0, set()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_NESTING:
                raise OptimaError(f"{name} is nested more than {MAX_NESTING} deep")
            if isinstance(event, yaml.AliasEvent) and event.anchor in anchors:
                raise OptimaError(f"{name} holds the YAML alias *{event.anchor:.40}; write out what it stands for")
            anchors.add(getattr(event, "anchor", None))
            value = getattr(event, "value", "")
            if value != text and ("*" in value or value.count("[") + value.count("{") > MAX_NESTING):
                refuse_hostile_yaml(value, name)
    except yaml.YAMLError:
        return


def load_yaml(text: str, name: str) -> Any:
    """The values of a YAML text. Raises OptimaError if it is hostile, or no YAML."""
    refuse_hostile_yaml(text, name)
    try:
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError) as error:
        raise OptimaError(f"{name} is no YAML ({' '.join(str(error).split())})") from error
