"""The blocks of docs/server.md by the job that runs them; the test starts one for each kind."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pages import python_blocks

PAGE = "docs/server.md"


def blocks_by_kind() -> dict[str, list[str]]:
    """The blocks that may share a job, for a job has one set of buckets."""
    found: dict[str, list[str]] = {}
    for block in python_blocks(PAGE):
        kind = "numpy"
        if "keras" in block:
            kind = "tensorflow"
        elif "optimizer" in block:
            kind = "torch, resumed" if ".load" in block else "torch"
        found.setdefault(kind + ", quorum" * ("rounds" in block), []).append(block)
    return found
