"""The block of docs/methods.md that trains under Horovod."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import horovod_job

pytestmark = pytest.mark.parallel


def test_the_block_with_an_estimator_trains(tmp_path: Path) -> None:
    for result in horovod_job(2, "methods_page.py", tmp_path):
        assert result["blocks"] == 1
        assert len(result["losses"]) == 100  # and what the block asserts held
