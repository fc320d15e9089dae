"""Makes the builders of broken things importable."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "optima" / "data"), str(HERE.parent / "optima")]
