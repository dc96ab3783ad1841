"""The Python blocks of the documentation, which tests run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def python_blocks(page: str) -> list[str]:
    """The Python blocks of a page, in order.

    Args:
        page: its path below the project's root.
    """
    return _BLOCK.findall((ROOT / page).read_text())


def run_in_order(blocks: list[str], page: str) -> dict[str, object]:
    """Run blocks as one script, so that one may use what those before it define; their names."""
    names: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {i}", "exec"), names)
    return names
