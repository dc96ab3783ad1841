"""The Python blocks of the documentation, which tests run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import dedent
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# What runs the blocks of a page: all of them, so that a new block needs no entry.
RUN_BY = {
    "CONTRIBUTING.md": ["contract/test_contributing.py"],
    "README.md": ["parallel/programs/docs_torch.py"],
    "docs/cluster.md": ["parallel/test_bandwidth.py"],
    "docs/methods.md": ["integration/test_methods_page.py", "parallel/programs/docs_torch.py"],
    "docs/server.md": ["parallel/programs/docs_blocks.py"],
    "docs/torch-distributed.md": ["parallel/programs/torch_ddp.py"],
    "docs/training.md": ["parallel/programs/docs_torch.py", "parallel/programs/docs_tensorflow.py"],
}
_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def python_blocks(page: str | Path, *, start: str = "", end: str = "") -> list[str]:
    """The Python blocks of a page, in order.

    Args:
        page: its path below the project's root.
        start: only from this heading on, such as "## Clipping".
        end: only before this heading.
    """
    text = (ROOT / page).read_text()
    text = text[text.index(f"\n{start}\n") :] if start else text
    text = text[: text.index(f"\n{end}\n")] if end else text
    return [dedent(block) for _, block in _BLOCK.findall(text)]


def run_in_order(
    blocks: Iterable[str],
    page: str,
    given: Callable[[str], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run blocks as one script, so that one may use what those before it define; their names.

    Args:
        blocks: from `python_blocks`.
        page: its path, to be named in errors.
        given: names that a block of a recipe takes as defined, anew for each block.
    """
    names: dict[str, Any] = {}
    for i, block in enumerate(blocks):
        names.update(given(block) if given else {})
        exec(compile(block, f"{page}, block {i}", "exec"), names)
    return names
