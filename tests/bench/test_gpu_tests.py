"""The tests that run on a GPU, told to the kit: each as soon as it is over, and what it failed by."""

from pathlib import Path

import pytest

from bench.gpu.context import Wrong
from bench.gpu.correctness import _verdict, told_by_pytest

FILE = """
import pytest

@pytest.mark.parametrize("x", [1, 2])
def test_of_numbers(x):
    print("noise")
    assert x == 1, "two is not one"

@pytest.mark.skip(reason="no chip")
def test_of_chips():
    pass
"""


def test_every_test_is_told_with_what_it_failed_by(tmp_path: Path) -> None:
    file = tmp_path / "test_example.py"
    file.write_text(FILE)
    right, wrong, skipped = told_by_pytest([str(file)], f"--rootdir={tmp_path}")
    assert right["test"].endswith("test_example.py::test_of_numbers[1]")
    assert (right["outcome"], right["words"]) == ("passed", "")
    assert _verdict(right) == {"verdict": "passed"}
    with pytest.raises(Wrong, match="two is not one"):
        _verdict(wrong)
    assert skipped["outcome"] == "skipped"
    assert "no chip" in skipped["words"]
