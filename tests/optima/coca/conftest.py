"""Lets tests say `from open_clip_oracle import ...` under --import-mode=importlib."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
