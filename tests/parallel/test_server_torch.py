"""PyTorch's optimizer with parameter servers: NumPy's numbers, overlap and dropped steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launching import server_job
from same_gradients import SEED, SHAPE, STEPS, digest, gradient

import ef_horovod as ef

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "method",
    [
        ef.DoubleSqueeze(ef.OneBit(), ef.OneBit()),
        ef.EF21(ef.TopK(0.05), momentum=0.5),
    ],
    ids=repr,
)
def test_same_numbers_as_the_simulation(method: ef.Method, workers: int, tmp_path: Path) -> None:
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
    for result in server_job(1, workers, "server_torch.py", tmp_path, repr(method)):
        assert result["x"] == digest(run.x)
        assert result["overlap"] == [True] * STEPS  # sent during backward
        assert result["skipped"] == [step == STEPS - 1 for step in range(STEPS + 1)]
        assert "got a process_set with exchange='server'" in result["process_set"]
        assert result["second"].startswith(
            "UnsupportedError: got a second optimizer, reducer, tape"
        )
