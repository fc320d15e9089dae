"""Numbers from files and command lines: within their bounds, or refused in a line that names them.

Imports the standard library alone, so that configurations are checked before torch is loaded.
"""

import math
from typing import Any


def whole_number(value: Any, name: str, least: int, most: int) -> int:
    """`value`, if it is a whole number within the bounds; raises ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r:.80}")
    return value


def number_within(value: Any, name: str, least: float, most: float) -> float:
    """`value`, if it is a finite number within the bounds; raises ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r:.80}")
    if not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r:.80}")
    return float(value)
