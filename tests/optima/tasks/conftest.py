"""The miniature official data sets of the data's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # for `from miniatures import ...`
