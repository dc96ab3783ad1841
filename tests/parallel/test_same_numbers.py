"""Every method x compressor x exchange: simulation, MPI, torch and TensorFlow end in the same bits.

Two ranks, for a sum of two numbers is the same in any order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import horovod_job, mpirun, torchrun
from same_gradients import SEED, SHAPE, STEPS, cases, dense_steps_of, digest, gradient

import ef_horovod as ef

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

RANKS = 2
FAST_CYCLE = {"HOROVOD_CYCLE_TIME": "0.2"}


# Without --all: what methods do to compressors needs no framework, and what compressors do in one
# does not change with the transport.
SAMPLES = {"mpi": "pairs", "torch": "singles", "tensorflow": "singles", "distributed": "methods"}


@pytest.fixture(scope="module")
def simulated(every_case: bool) -> dict[str, str]:
    return {
        f"{method} by {exchange}": digest(simulate(method, exchange))
        for method, exchange in cases("all" if every_case else "pairs")
    }


def names(which: str) -> list[str]:
    return [f"{method} by {exchange}" for method, exchange in cases(which)]


def simulate(method: ef.Method, exchange: str) -> np.ndarray:
    run = ef.simulate(
        method,
        lambda rank, x, step: gradient(rank, step),
        np.zeros(SHAPE, np.float32),
        workers=RANKS,
        steps=STEPS,
        step_size=1.0,
        seed=SEED,
        name="bucket.0",
        exchange=exchange,
        dense_steps=dense_steps_of(method),
    )
    return run.x


@pytest.mark.parametrize("way", ["mpi", "torch", "tensorflow", "distributed"])
def test_every_method_compressor_and_exchange(
    way: str, every_case: bool, simulated: dict[str, str], tmp_path: Path
) -> None:
    launchers: dict[str, Any] = {"mpi": mpirun, "distributed": torchrun}
    launch = launchers.get(way, horovod_job)
    which = "all" if every_case else SAMPLES[way]
    expected = {name: simulated[name] for name in names(which)}
    words = (way, which)
    results = launch(
        RANKS, "same_numbers.py", tmp_path, *words, timeout=600, environment=FAST_CYCLE
    )
    for rank, result in enumerate(results):
        different = [name for name, end in expected.items() if result.get(name) != end]
        assert result.keys() == expected.keys()
        assert not different, f"rank {rank} by {way}: {len(different)} of {len(result)} differ"


def test_the_numbers_of_methods_differ(simulated: dict[str, str]) -> None:
    """Or equal digests above would show nothing."""
    assert len(set(simulated.values())) > len(simulated) / 3
