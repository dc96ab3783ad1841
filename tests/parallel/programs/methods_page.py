"""Runs the block of docs/methods.md that needs Horovod."""

from __future__ import annotations

import sys
from pathlib import Path

import horovod.torch as hvd
from common import report

sys.path.insert(0, str(Path(__file__).parents[2]))

from pages import python_blocks, run_in_order

page = "docs/methods.md"
blocks = [block for block in python_blocks(page) if "horovod.torch" in block]
names = run_in_order(blocks, page)
report(hvd.rank(), {"blocks": len(blocks), "losses": names["losses"]})
