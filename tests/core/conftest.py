"""Lets the tests of this folder share a model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `from plain_models import ...` under --import-mode=importlib
