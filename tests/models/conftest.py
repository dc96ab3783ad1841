"""These tests need Hugging Face's transformers and peft; a plain pytest does not collect them.

`launch/test --models` installs both into its environment and runs them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PARALLEL = Path(__file__).parents[1] / "parallel"
sys.path += [str(PARALLEL), str(PARALLEL / "programs")]

collect_ignore_glob = [] if os.environ.get("EF_TEST_MODELS") else ["test_*.py"]
