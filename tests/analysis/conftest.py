"""With the helpers of the tests of data and heads."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "data"))
sys.path.append(str(Path(__file__).parents[1] / "heads"))
