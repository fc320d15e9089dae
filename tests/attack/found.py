"""What a fuzzer found: inputs that once ended in something else than a verdict, by the reader that met them."""

import base64
from collections.abc import Iterator

from cases import Case, Verdict, written

FOUND: tuple[tuple[str, str, str, str, str], ...] = ()
"""(reader, file, base64 of the input, outcome, words)."""


def found_cases() -> Iterator[Case]:
    for place, (reader, file, text, outcome, words) in enumerate(FOUND):
        verdict = Verdict(outcome, words)  # type: ignore[arg-type]
        yield Case(reader, f"found by fuzzing, {place}", written(base64.b64decode(text)), verdict, file)
