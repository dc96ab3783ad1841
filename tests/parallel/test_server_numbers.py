"""Through servers all numbers are those of the simulation, and of the paper's algorithm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from doublesqueeze_oracle import TRAININGS, train
from launching import server_job
from same_gradients import SEED, SHAPE, STEPS, digest, gradient

import ef_horovod as ef
from ef_horovod.testing.pairs import every_method

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

EVERY_METHOD = [(1, 1), (1, 2), (2, 4), (3, 7)]  # servers, workers


def simulated(workers: int) -> dict[str, str]:
    ends = {}
    for i, method in enumerate(every_method()):
        run = ef.simulate(
            method,
            lambda rank, x, step: gradient(rank, step),
            np.zeros(SHAPE, np.float32),
            workers=workers,
            steps=STEPS,
            step_size=1.0,
            seed=SEED,
            name=f"x{i}",
            exchange="server",
        )
        ends[f"x{i} by {method}"] = digest(run.x)
    return ends


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
@pytest.mark.parametrize("servers", [1, 2, 3])
def test_same_bits(servers: int, workers: int, tmp_path: Path) -> None:
    """DoubleSqueeze by its oracle; every method and compressor by the simulation."""
    every = ("every",) * ((servers, workers) in EVERY_METHOD)
    results = server_job(
        servers,
        workers,
        "server_numbers.py",
        tmp_path,
        *every,
        timeout=600,
        server=("--timeout=300",),
    )
    expected = simulated(workers) if every else {}
    for rank, result in enumerate(results):
        for name, training in TRAININGS.items():
            end = {key: digest(value) for key, value in train(training, workers).items()}
            assert result[name] == end, f"rank {rank}: {name}"
        mine = result["every"]
        different = [name for name, end in expected.items() if mine.get(name) != end]
        assert mine.keys() == expected.keys()
        assert not different, f"rank {rank}: {len(different)} of {len(mine)} differ: {different}"
    if every:  # or equal digests would show nothing
        assert len(set(expected.values())) > len(expected) / 3


def test_torch_tensors_go_through_a_server(tmp_path: Path) -> None:
    """The same channels on tensors, in the same job as NumPy's server: the bits of NumPy."""
    expected = simulated(2)
    for result in server_job(1, 2, "server_numbers.py", tmp_path, "every", "torch", timeout=600):
        different = [name for name, end in expected.items() if result["every"].get(name) != end]
        assert not different, f"{len(different)} of {len(expected)} differ: {different}"
