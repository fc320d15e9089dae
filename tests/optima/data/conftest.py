"""A fresh seed for every run, printed with a failure; OPTIMA_TEST_SEED repeats one."""

import os
import secrets
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `from pictograms_oracle import ...` under --import-mode=importlib


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("OPTIMA_TEST_SEED") or secrets.randbelow(2**32))
    print(f"OPTIMA_TEST_SEED={chosen}")
    return chosen
