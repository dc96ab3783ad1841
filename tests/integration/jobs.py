"""Starts the example scripts as users do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from processes import BIN, run_job

ROOT = Path(__file__).parents[2]
_TAG = re.compile(r"\[\d+,\d+\]<std(out|err)>:")


def run_example(name: str, *arguments: object, ranks: int = 0, timeout: float = 180) -> str:
    """Run examples/NAME, under horovodrun if `ranks` are given; what it printed, without tags.

    It runs in the repository's root, but never writes there unless the arguments say so.
    """
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    if ranks:
        command = [str(BIN / "horovodrun"), "-np", str(ranks), *command]
    return _TAG.sub("", run_job(command, timeout=timeout, cwd=ROOT))
