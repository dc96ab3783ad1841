"""Through servers all numbers are those of the simulation, and of the paper's algorithm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doublesqueeze_oracle import TRAININGS, train
from launching import mpirun, server_job
from same_gradients import SEED, SHAPE, STEPS, digest, gradient, methods_of_servers

import ef_horovod as ef

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

SERVERS, WORKERS = (1, 2, 3), (1, 2, 4, 7)
EVERY_METHOD = [(1, 1), (1, 2), (2, 4), (3, 7)]  # servers, workers


@pytest.fixture(scope="module")
def which(every_case: bool) -> str:
    """Of the methods and compressors: the sample has every one of both."""
    return "all" if every_case else "sample"


def simulated(which: str, workers: int) -> dict[str, str]:
    ends = {}
    for i, method in enumerate(methods_of_servers(which)):
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


@pytest.fixture(scope="module")
def ends(which: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every worker of every case found, by "SERVERS WORKERS RANK"; all in one MPI job."""
    cases = [[s, w, (s, w) in EVERY_METHOD] for s in SERVERS for w in WORKERS]
    ranks, out = max(SERVERS) + max(WORKERS), tmp_path_factory.mktemp("cases")
    words = (which, "cases", json.dumps(cases))
    results = mpirun(ranks, "server_numbers.py", out, *words, timeout=900)
    return {case: end for result in results for case, end in result.items()}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("servers", SERVERS)
def test_same_bits(servers: int, workers: int, which: str, ends: dict[str, Any]) -> None:
    """DoubleSqueeze by its oracle; every method and compressor by the simulation."""
    every = (servers, workers) in EVERY_METHOD
    expected = simulated(which, workers) if every else {}
    for rank in range(workers):
        result = ends[f"{servers} {workers} {rank}"]
        for name, training in TRAININGS.items():
            end = {key: digest(value) for key, value in train(training, workers).items()}
            assert result[name] == end, f"rank {rank}: {name}"
        mine = result["every"]
        different = [name for name, end in expected.items() if mine.get(name) != end]
        assert mine.keys() == expected.keys()
        assert not different, f"rank {rank}: {len(different)} of {len(mine)} differ: {different}"
    if every:  # or equal digests would show nothing
        assert len(set(expected.values())) > len(expected) / 3


def test_torch_tensors_go_through_a_server(which: str, tmp_path: Path) -> None:
    """The same channels on tensors, in the same job as NumPy's server: the bits of NumPy."""
    expected = simulated(which, 2)
    for result in server_job(1, 2, "server_numbers.py", tmp_path, which, "torch", timeout=600):
        different = [name for name, end in expected.items() if result["every"].get(name) != end]
        assert not different, f"{len(different)} of {len(expected)} differ: {different}"
