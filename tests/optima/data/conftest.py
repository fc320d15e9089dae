"""Lets the tests of data import the oracles that lie beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `from pictograms_oracle import ...` under --import-mode=importlib
