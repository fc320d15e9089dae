"""Writes optima/data/vocabulary.json from the language: `python -m optima.data.pictograms.build_vocabulary`.

Only needed to change the language; models trained with the old file cannot read texts encoded with the new one.
"""

import json

from optima.data.pictograms.words import words
from optima.data.tokenizer import END, PAD, START, UNKNOWN, VOCABULARY


def vocabulary() -> dict[str, int]:
    """Word -> id: the four special tokens first, then the words of the language."""
    return {word: number for number, word in enumerate((PAD, START, END, UNKNOWN, *words()))}


def main() -> None:
    table = vocabulary()
    VOCABULARY.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{VOCABULARY}: {len(table)} words")


if __name__ == "__main__":
    main()
