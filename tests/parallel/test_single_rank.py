"""A script that uses ef_horovod also runs by itself, and then trains as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import alone, horovod_job

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("launched", [False, True])
def test_one_rank_is_the_plain_optimizer(launched: bool, tmp_path: Path) -> None:
    if launched:
        (result,) = horovod_job(1, "single_rank.py", tmp_path)
    else:
        result = alone("single_rank.py", tmp_path)
    assert result["ef"] == result["plain"]
    assert result["stock"] == result["plain"]
