"""What the programs of the parallel tests share, whatever their framework."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUT = Path(sys.argv[1])
ARGUMENTS = sys.argv[2:]


def report(rank: int, result: dict[str, Any]) -> None:
    """Leave a rank's result where the test reads it."""
    (OUT / f"rank{rank}.json").write_text(json.dumps(result))


def error_of(action: Callable[[], Any]) -> str:
    """'TypeName: message' of what an action raises, or '' if it raises nothing."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
