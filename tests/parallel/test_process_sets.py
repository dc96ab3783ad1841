"""Averaging over some of the ranks only."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import horovod_job

pytestmark = pytest.mark.parallel


def test_only_the_ranks_of_the_set_train_together(tmp_path: Path) -> None:
    first, outside, second = horovod_job(3, "process_sets.py", tmp_path)
    for adapter in ("ef", "stock"):
        assert first[adapter] == second[adapter]
        assert first[adapter] != first["alone"]
        assert outside[adapter] == outside["alone"]
