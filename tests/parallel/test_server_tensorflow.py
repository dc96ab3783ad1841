"""TensorFlow's adapter with parameter servers: the same numbers, dropped steps, overlap, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import ended_job, server_job
from same_gradients import SEED, SHAPE, STEPS, digest, gradient

import ef_horovod as ef

pytestmark = pytest.mark.parallel

PROGRAM = "server_tensorflow.py"
SECOND = "UnsupportedError: got a second optimizer, reducer, tape or Worker in a job with parameter"


METHODS = [
    ef.DoubleSqueeze(ef.OneBit(), ef.OneBit()),
    ef.DoubleSqueeze(ef.TopK(0.05), ef.TopK(0.05)),
    ef.EF21(ef.TopK(0.05)),
    ef.NoFeedback(ef.Identity()),
]


def test_numbers_of_torch_and_of_the_simulation(tmp_path: Path) -> None:
    """Half of the steps eager, half in a tf.function; a NaN on one worker in each half."""
    names, jobs = [repr(method) for method in METHODS], len(METHODS)
    folders = [tmp_path / "torch", tmp_path / "tensorflow"]
    for folder in folders:
        folder.mkdir()
    by_torch = server_job(1, 2, "server_torch.py", folders[0], *names, jobs=jobs)
    by_tensorflow = server_job(1, 2, PROGRAM, folders[1], "numbers", *names, jobs=jobs)
    for i, method in enumerate(METHODS):
        end = simulated(method)
        assert [result["methods"][i]["x"] for result in by_torch] == [end] * 2
        with_memory = method != ef.NoFeedback(ef.Identity())
        for results in by_tensorflow:
            result = results["methods"][i]
            assert result["x"] == end
            # variable and memories, by the dropped steps
            assert result["unchanged"] == [True, True]
            assert (result["memories"] > 0) == with_memory
            assert result["exchange"] == "server"
            assert ["which is closed" in error for error in result["closed"]] == [True, True]
            assert result["steps"] == STEPS
            assert min(result["bytes"]) > 0


def simulated(method: ef.Method) -> str:
    run = ef.simulate(
        method,
        lambda rank, x, step: gradient(rank, step),
        np.zeros(SHAPE, np.float32),
        workers=2,
        steps=STEPS,
        step_size=1.0,
        seed=SEED,
        name="bucket.0",
        exchange="server",
    )
    return digest(run.x)


@pytest.fixture(scope="module")
def in_a_row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What both workers found in jobs one after the other, on the same processes."""
    jobs = ("fit", "tape", "overlap", "rows", "unequal_start")
    results = server_job(2, 2, PROGRAM, tmp_path_factory.mktemp("jobs"), *jobs, jobs=len(jobs))
    return {job: [result[job] for result in results] for job in jobs}


def test_keras_fit_and_what_needs_horovod(in_a_row: dict[str, list[Any]]) -> None:
    results = in_a_row["fit"]
    assert results[0]["end"] == results[1]["end"] != results[0]["start"]
    for result in results:
        assert result["accuracy"] > 0.6  # by chance 0.1
        assert result["channels"] == ["dense.0", "bucket.0", "bucket.1", "total"]
        assert result["steps"] == 200
        assert result["ratio"] < 0.25
        *of_horovod, process_set = result["refused"]
        names = ("broadcast_variables", "require_in_sync", "TrainingCallback")
        for name, error in zip(names, of_horovod, strict=True):
            expected = f"UnsupportedError: got ef.{name} without an initialised Horovod"
            assert error.startswith(expected)
        assert "got a process_set with exchange='server'" in process_set
        assert len(result["second"]) == 3
        for error in result["second"]:
            assert error.startswith(SECOND)


def test_a_tape_and_an_optimizer(in_a_row: dict[str, list[Any]]) -> None:
    for result in in_a_row["tape"]:
        assert all(total > 0 for total in result["sums"])
        assert len(result["second"]) == 2
        for error in result["second"]:
            assert error.startswith(SECOND)


def test_a_bucket_leaves_during_backward(in_a_row: dict[str, list[Any]]) -> None:
    assert in_a_row["overlap"] == [[True] * 3] * 2


def test_unequal_first_values_are_found(in_a_row: dict[str, list[Any]]) -> None:
    for first, second in in_a_row["unequal_start"]:
        assert first == ""
        assert "OutOfSyncError: the parameters of rank 0 and rank 1 differ" in second


def test_rows_are_refused(in_a_row: dict[str, list[Any]]) -> None:
    for error in in_a_row["rows"]:
        assert "UnsupportedError: the gradient of 'Variable:0' is tf.IndexedSlices" in error
        assert "pass sparse_as_dense=True" in error


def test_a_silent_worker_is_named_in_time(tmp_path: Path) -> None:
    limit = {"EF_HOROVOD_TIMEOUT": "9"}  # runs from when TensorFlow is loaded on
    output, results = ended_job(1, 2, PROGRAM, tmp_path, "silent", environment=limit, jobs=1)
    problem = "waited 9 s for workers [1] to send 'bucket.0' in round 3"
    assert problem in output
    seconds, _, error = results[0].partition(" s: ")
    assert "CollectiveTimeoutError" in error
    assert problem in error
    assert 8 < float(seconds) < 54


def test_a_quorum_is_refused(tmp_path: Path) -> None:
    method = repr(ef.EF21(ef.OneBit()))
    output, _ = ended_job(1, 2, PROGRAM, tmp_path, "numbers", method, server=("--quorum=1",))
    assert "UnsupportedError: got a server with a quorum of 1, expected one that waits" in output
