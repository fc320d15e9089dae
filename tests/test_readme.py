"""The examples of the README run as they stand."""

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parent.parent / "README.md"


def example(heading: str) -> str:
    """The first Python block under a heading."""
    section = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block.group(1)


def test_two_models_of_ones_own_are_distilled_in_under_30_lines() -> None:
    torch.manual_seed(0)
    code = example("Your own models")
    names: dict[str, Any] = {}
    exec(code, names)
    first, last = names["records"][0].probe, names["records"][-1].probe
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    assert last["task"] < 0.9 * first["task"]
    assert all(last[f"hidden/encoder/{layer}"] < first[f"hidden/encoder/{layer}"] for layer in (0, 1))


def test_the_losses_are_called_as_shown() -> None:
    torch.manual_seed(0)
    batch, heads, tokens, vocabulary = 2, 4, 5, 11
    names: dict[str, Any] = {
        "q_s": torch.randn(batch, heads, tokens, 8, requires_grad=True),
        "k_s": torch.randn(batch, heads, tokens, 8),
        "q_t": torch.randn(batch, heads, tokens, 16),
        "k_t": torch.randn(batch, heads, tokens, 16),
        "h_s": torch.randn(tokens, 32, requires_grad=True),
        "h_t": torch.randn(tokens, 64),
        "weight": torch.randn(64, 32),
        "bias": torch.randn(64),
        "mask": torch.tensor([True, True, False, True, True]),
        "w_s": torch.randn(vocabulary, 32),
        "w_t": torch.randn(vocabulary, 64),
    }
    exec(example("The losses alone"), names)
    assert all(torch.isfinite(names[loss]) and names[loss] > 0 for loss in ("maps", "states", "words"))
