"""Makes the launching helpers, and what programs share with their tests, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent / "programs"))
