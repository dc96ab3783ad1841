"""PyTorch's optimizer with parameter servers: NumPy's numbers, overlap and dropped steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import server_job
from same_gradients import SEED, SHAPE, STEPS, digest, gradient

import ef_horovod as ef

pytestmark = pytest.mark.parallel


METHODS = [
    ef.DoubleSqueeze(ef.OneBit(), ef.OneBit()),
    ef.EF21(ef.TopK(0.05), momentum=0.5),
]


@pytest.mark.parametrize("workers", [1, 2])
def test_same_numbers_as_the_simulation(workers: int, tmp_path: Path) -> None:
    names = map(repr, METHODS)
    ends = server_job(1, workers, "server_torch.py", tmp_path, *names, jobs=len(METHODS))
    for end in ends:
        for method, result in zip(METHODS, end["methods"], strict=True):
            require_same(method, workers, result)


def require_same(method: ef.Method, workers: int, result: dict[str, Any]) -> None:
    run = ef.simulate(
        method,
        lambda rank, x, step: gradient(rank, step),
        np.zeros(SHAPE, np.float32),
        workers=workers,
        steps=STEPS,
        step_size=1.0,
        seed=SEED,
        name="bucket.0",
        exchange="server",
    )
    assert result["x"] == digest(run.x)
    assert result["overlap"] == [True] * STEPS  # sent during backward
    assert result["skipped"] == [step == STEPS - 1 for step in range(STEPS + 1)]
    assert "got a process_set with exchange='server'" in result["process_set"]
    assert result["second"].startswith("UnsupportedError: got a second optimizer, reducer, tape")
    assert re.match(
        r"UnsupportedError: got a step .* of worker \d, which is closed", result["closed"]
    )
    if workers == 1:
        assert result["apart"] == ""
    else:
        assert result["apart"].startswith("OutOfSyncError: the parameters of rank 0 and rank 1")
        assert "by torch.manual_seed(seed) or a file" in result["apart"]
