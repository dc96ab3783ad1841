"""Workers of a node sum among themselves first: a server hears one worker per node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import Results, mpirun, server_job
from server_nodes_gradients import BAD, LIMIT, METHODS, SHAPES, STEPS, TOP, gradient

import ef_horovod as ef
from ef_horovod.exchange.double_pass import cuts
from ef_horovod.server.protocol import HEADER_NBYTES

pytestmark = pytest.mark.parallel

BUCKETS = {"w": "bucket.1", "v": "bucket.0"}
GOOD = [step for step in range(STEPS) if step != BAD]


def numbers(text: str, name: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.float32).reshape(SHAPES[name])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of two servers and four workers, who are told to be on nodes of 2 + 2, or of 1 + 3."""
    out = tmp_path_factory.mktemp("server_nodes")
    return mpirun(6, "server_nodes.py", out, timeout=400)


@pytest.fixture(scope="module")
def workers(results: Results) -> Results:
    return results[2:]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_numbers_are_those_without_a_server(method: ef.Method, workers: Results) -> None:
    """With a NaN on the last worker in one step, which all workers drop."""
    for name, bucket in BUCKETS.items():
        run = ef.simulate(
            method,
            lambda worker, x, step, name=name: gradient(worker, GOOD[step], name),
            np.zeros(SHAPES[name], np.float32),
            workers=4,
            ranks_per_node=2,
            steps=len(GOOD),
            step_size=1.0,
            seed=3,
            name=bucket,
            exchange="hierarchical:gather",
        )
        for worker in workers:
            assert worker[repr(method)]["end"][name] == run.x.tobytes().hex(), name
    for worker in workers:
        assert worker[repr(method)]["end"] == workers[0][repr(method)]["end"]
        assert worker[repr(method)]["skipped"] == 1
        assert worker[repr(method)]["exchange"] == "hierarchical:server"


@pytest.mark.parametrize("case", ["no drop", "unequal", "plain"])
def test_the_direction_is_the_mean_over_workers(case: str, workers: Results) -> None:
    """Also of nodes with one and three; the uncompressed parameter shows it in all cases."""
    mean = sum(gradient(worker, step, "b") for worker in range(4) for step in range(STEPS)) / 4
    for worker in workers:
        assert np.array_equal(numbers(worker[case]["end"]["b"], "b"), -mean)
    if case == "unequal":
        mean = sum(gradient(worker, step, "w") for worker in range(4) for step in range(STEPS)) / 4
        assert np.array_equal(numbers(workers[3][case]["end"]["w"], "w"), -mean)


def test_a_node_sends_what_one_worker_would(workers: Results) -> None:
    slices, whole = TOP.nbytes(64 * 64), TOP.nbytes(64 * 128)
    for worker in workers:
        assert worker["no drop"]["out"] == STEPS * (HEADER_NBYTES + slices)
        assert worker["no drop"]["dense"] == STEPS * 4 * 64 * 64
        assert worker["plain"]["out"] == STEPS * (HEADER_NBYTES + whole)
    sent = [worker["unequal"]["out"] for worker in workers]
    assert sent[:2] == [STEPS * (HEADER_NBYTES + ef.Identity().nbytes(64 * 128))] * 2
    assert sent[2:] == [0, 0]  # their node's first worker speaks to the server


def test_a_checkpoint_goes_on_to_the_same_bits(workers: Results) -> None:
    assert [worker["resumed"] for worker in workers] == [True] * 4


def test_a_worker_with_another_exchange_is_named(workers: Results) -> None:
    for worker in workers:
        assert worker["disagree"].startswith("ConfigMismatchError: worker 0 has ")
        assert " by nodes " in worker["disagree"]
        assert "and worker 1 has " in worker["disagree"]


def test_a_quorum_is_refused(results: Results) -> None:
    for result in results:
        assert "got a quorum of 2 with exchange='hierarchical:server'" in result["quorum"]
        assert "leave --quorum out" in result["quorum"]


def test_a_silent_worker_is_named_by_its_node(workers: Results) -> None:
    named = f"worker 2 waited {LIMIT:g} s in 'dense.0.sum' for workers [3] of its node"
    for worker in workers:
        assert named in worker["one silent"]["error"]
        assert worker["one silent"]["seconds"] < LIMIT + 2


def test_a_silent_node_is_named_by_the_server(workers: Results) -> None:
    for worker in workers:
        assert worker["node silent"]["error"].startswith("CollectiveTimeoutError: server ")
        assert " s for workers [2, 3] to send " in worker["node silent"]["error"]
        assert worker["node silent"]["seconds"] < LIMIT + 4


@pytest.mark.slow
def test_torch_and_tensorflow_take_the_same_steps(tmp_path: Path) -> None:
    """Two workers on one node: the server hears one, by slices; a NaN drops a step."""
    expected = np.concatenate([_of_slice(*cut, j) for j, cut in enumerate(cuts(64 * 128, 2))])
    sent = STEPS * (HEADER_NBYTES + TOP.nbytes(64 * 64))
    program = "server_nodes_frameworks.py"
    for result in server_job(1, 2, program, tmp_path, jobs=2, timeout=400):
        for framework in ("by_torch", "by_tensorflow"):
            found = result[framework]
            assert found["end"] == expected.tobytes().hex(), framework
            facts = {"skipped": 1, "exchange": "hierarchical:server", "out": sent}
            assert {key: found[key] for key in facts} == facts


def _of_slice(start: int, stop: int, j: int) -> Any:
    def mean(_: int, x: Any, step: int) -> Any:
        whole = sum(gradient(worker, GOOD[step], "w") for worker in range(2)).reshape(-1)
        return whole[start:stop] / 2

    zeros = np.zeros(stop - start, np.float32)
    options = dict(workers=1, steps=len(GOOD), step_size=1.0, seed=3, exchange="server")
    return ef.simulate(METHODS[0], mean, zeros, name=f"bucket.0.slice.{j}", **options).x
