"""What goes wrong in a job with a server ends in the named error, or leaves no trace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import PROGRAMS, ended_job, mpirun, server_job
from server_faults_model import gradients

import ef_horovod as ef

pytestmark = pytest.mark.parallel

PROGRAM = "server_faults.py"
LIMIT = {"EF_HOROVOD_TIMEOUT": "10"}


IN_A_ROW = (
    "another_shape",
    "another_name",
    "wrong_shape",
    "traffic",
    "rogue",
    "closed",
    "old_error",
)


@pytest.fixture(scope="module")
def in_a_row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What both workers found in jobs after which the processes go on; these are the same ones."""
    out = tmp_path_factory.mktemp("in_a_row")
    results = server_job(1, 2, PROGRAM, out, *IN_A_ROW, jobs=len(IN_A_ROW))
    return dict(zip(IN_A_ROW, zip(*results, strict=True), strict=True))


def test_workers_with_another_method(tmp_path: Path) -> None:
    problem = (
        "worker 0 has bucket 'bucket.0' of 2000 elements by EF21(TopK(ratio=0.05)) with seed 0 "
        "and worker 1 has bucket 'bucket.0' of 2000 elements by EF21(TopK(ratio=0.06)) with"
    )
    output, results = ended_job(2, 2, PROGRAM, tmp_path, "another_method")
    assert f"ef_horovod.server: error: ConfigMismatchError: {problem[:60]}" in output
    for rank in range(2):
        assert results[rank].startswith("ConfigMismatchError: ")
        assert problem in results[rank]


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        ("another_shape", "worker 0 has bucket 'dense.0' of 40 elements"),
        (
            "another_name",
            "worker 0 has parameter 'b' of shape (40,) and worker 1 has parameter 'c'",
        ),
    ],
)
def test_workers_that_disagree(scenario: str, problem: str, in_a_row: dict[str, list[Any]]) -> None:
    for error in in_a_row[scenario]:
        assert error.startswith("ConfigMismatchError: ")
        assert problem in error


def test_a_server_with_another_method(tmp_path: Path) -> None:
    options = ("--method=ef21", "--compressor=topk:0.01")
    output, results = ended_job(1, 2, PROGRAM, tmp_path, "all_alike", server=options)
    problem = "the server has EF21(TopK(ratio=0.01)) and the workers have EF21(TopK(ratio=0.05))"
    assert problem in output
    assert [problem in results[rank] for rank in range(2)] == [True, True]


def test_a_silent_worker_is_named_in_time(tmp_path: Path) -> None:
    output, results = ended_job(2, 2, PROGRAM, tmp_path, "silent", environment=LIMIT)
    problem = "waited 10 s for workers [1] to send 'dense.0' in round 3"
    assert problem in output or "waited 10 s for workers [1] to send 'bucket.0'" in output
    seconds, _, error = results[0].partition(" s: ")
    assert error.startswith("CollectiveTimeoutError: server")
    assert "waited 10 s for workers [1]" in error
    assert 9 < float(seconds) < 25
    assert "worker.transport.barrier(name)" in error, "it may wait for the servers"


def test_a_round_is_limited_from_its_first_message_on(tmp_path: Path) -> None:
    """Not from the latest one: then the worker that has waited longest would blame the server."""
    limit = {"EF_HOROVOD_TIMEOUT": "6"}
    _, results = ended_job(1, 3, PROGRAM, tmp_path, "late", environment=limit)
    seconds, _, error = results[0].partition(" s: ")
    assert error.startswith("CollectiveTimeoutError: server 0 waited 6 s for workers [2] to send")
    assert 5 < float(seconds) < 8


def test_pauses_of_all_workers_have_no_limit(tmp_path: Path) -> None:
    """Data are loaded, a model is validated or saved: nobody waits for anybody."""
    limit = {"EF_HOROVOD_TIMEOUT": "3"}
    folder = f"--checkpoint={tmp_path / 'server'}"
    results = server_job(1, 2, PROGRAM, tmp_path, "pauses", server=(folder,), environment=limit)
    assert results == [5, 5]


def test_a_checkpoint_that_one_worker_does_not_ask_for_is_limited(tmp_path: Path) -> None:
    limit = {"EF_HOROVOD_TIMEOUT": "4"}
    folder = f"--checkpoint={tmp_path / 'server'}"
    _, results = ended_job(
        1, 2, PROGRAM, tmp_path, "one_checkpoint", server=(folder,), environment=limit
    )
    problem = "CollectiveTimeoutError: server 0 waited 4 s for workers [1] to ask for a checkpoint"
    assert results[0].startswith(f"{problem} of step 1; see why they did not")


def test_a_closed_worker_says_so_at_once(in_a_row: dict[str, list[Any]]) -> None:
    for rank, errors in enumerate(in_a_row["closed"]):
        assert errors.pop("seconds") < 2
        problem = f"UnsupportedError: got a step or checkpoint of worker {rank}, which is closed"
        for name, error in errors.items():
            assert error.startswith(problem), name


def test_another_worker_after_a_closed_one_is_refused_at_once(tmp_path: Path) -> None:
    for error, seconds in server_job(1, 2, PROGRAM, tmp_path, "another_after_the_end"):
        assert error.startswith("UnsupportedError: got a second optimizer, reducer, tape or Worker")
        assert error.endswith("close it only after the last step, because the servers end with it")
        assert seconds < 2


@pytest.mark.parametrize(
    ("scenario", "call"),
    [
        ("collective_of_all_ranks", "MPI.COMM_WORLD.Barrier"),
        ("collective_of_all_ranks_after_the_end", "world.allgather"),
    ],
)
def test_a_worker_that_waits_for_servers_in_a_collective_is_told_so(
    scenario: str, call: str, tmp_path: Path
) -> None:
    begin = time.monotonic()
    limit = {"EF_HOROVOD_TIMEOUT": "4"}
    output, _ = ended_job(1, 2, PROGRAM, tmp_path, scenario, environment=limit)
    assert f" waited 4 s in {call}() ({PROGRAMS / PROGRAM}, line " in output
    assert "call worker.transport.barrier(name), or allgather or allreduce of" in output
    assert time.monotonic() - begin < 60


def test_an_error_of_long_ago_ends_nobodys_job(in_a_row: dict[str, list[Any]]) -> None:
    assert in_a_row["old_error"] == ([""], [""]), "what the servers hear as reason of the end"


def test_a_rank_that_does_not_start_is_named(tmp_path: Path) -> None:
    output, _ = ended_job(1, 2, PROGRAM, tmp_path, "missing", environment=LIMIT)
    assert "server with rank 0 waited 10 s for ranks [2] to start as server or worker" in output
    assert "make the Worker or wrap the optimizer before data are loaded" in output


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        ("failing", "ServerError: worker 1 failed: ValueError: no data left"),
        ("early_end", "ServerError: workers [1] have ended after 3 rounds while [0] go on"),
    ],
)
def test_a_worker_that_ends_early(scenario: str, problem: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    output, results = ended_job(2, 2, PROGRAM, tmp_path, scenario)
    assert problem in output
    assert problem in results[0]
    assert time.monotonic() - begin < 60  # not the limit of 120 s


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        ("never_a_worker", "the process with rank 2 has ended before it became a server or a wor"),
        ("fails_before_it_is_a_worker", "worker (ValueError: no data at all), expected all ranks"),
        ("leaves_before_its_first_step", "worker 1 has ended before its first step, expected it"),
        ("all_leave_before_their_first_step", " has ended before its first step, expected it to"),
    ],
)
def test_a_worker_that_ends_before_its_first_step(
    scenario: str, problem: str, tmp_path: Path
) -> None:
    begin = time.monotonic()
    output, _ = ended_job(1, 2, PROGRAM, tmp_path, scenario)
    assert "ef_horovod.server: error: ServerError: " in output
    assert problem in output
    assert time.monotonic() - begin < 60  # not the limit of 120 s


def test_a_worker_that_ends_before_it_starts_mpi(tmp_path: Path) -> None:
    """MPI's own start has no limit. If the server was there first, mpirun ends the job."""
    begin = time.monotonic()
    limit = {"EF_HOROVOD_TIMEOUT": "5"}
    output, _ = ended_job(1, 2, "server_ends_at_once.py", tmp_path, environment=limit)
    assert time.monotonic() - begin < 60
    assert "waited 5 s for all ranks to start MPI" in output or "exiting improperly" in output


@pytest.mark.parametrize("scenario", ["killed", "server_killed"])
def test_a_killed_rank_ends_the_job(scenario: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    output, _ = ended_job(1, 2, PROGRAM, tmp_path, scenario)
    assert "exited on signal 9 (Killed)" in output
    assert time.monotonic() - begin < 60


def test_a_server_that_hangs_is_named_and_the_job_ends(tmp_path: Path) -> None:
    begin = time.monotonic()
    limit = {"EF_HOROVOD_TIMEOUT": "5"}
    output, results = ended_job(1, 2, PROGRAM, tmp_path, "server_stopped", environment=limit)
    assert time.monotonic() - begin < 60
    for rank in range(2):
        assert results[rank].startswith(f"CollectiveTimeoutError: worker {rank} waited 7.5 s in '")
        assert "for servers with ranks [0]" in results[rank]
    assert "MPI_ABORT was invoked" in output


def test_a_job_without_a_server(tmp_path: Path) -> None:
    for result in mpirun(2, PROGRAM, tmp_path, "all_alike"):
        assert result.startswith("UnsupportedError: got 0 servers and 2 workers in this MPI job")


def test_mistakes_in_a_call_are_named(in_a_row: dict[str, list[Any]]) -> None:
    for errors in in_a_row["wrong_shape"]:
        assert "got a gradient 'b' of shape (41,), expected (40,)" in errors[0]
        assert "got a gradient 'x' of shape (3,), expected one of ['w', 'b']" in errors[1]
        assert "got no gradient of ['b'] in this step" in errors[2]
        assert "got the gradient 'w' twice in a step" in errors[3]


def test_bytes_up_and_down(in_a_row: dict[str, list[Any]]) -> None:
    """At most 1/30 of dense for 1-bit and 1/50 for top-k 1 %, headers included."""
    headers = 4 * (40 + 16)  # of four messages, and of the payloads in them
    for result in in_a_row["traffic"]:
        dense = 4 * 400_000
        assert result["dense"] == [dense, dense + headers, dense + headers - 4 * 16]
        for name, share, compressor in (("onebit", 30, ef.OneBit()), ("topk", 50, ef.TopK(0.01))):
            message = 40 + compressor.nbytes(100_000)
            assert result[name] == [dense, 4 * message, 4 * message]
            assert share * result[name][1] <= dense


REFUSALS = {
    "nothing": "has 0 bytes, expected at least the 40",
    "few bytes": "has 7 bytes, expected at least the 40",
    "random bytes": "a message starts with magic",
    "too many bytes": "got 10000000 bytes with tag 2, expected nothing there, or less",
    "another tag": "got 200 bytes with tag 99, expected nothing there",
    "control tag": "a message starts with magic",
    "another bucket": "worker 1 sent bucket 0 with tag 2",
    "another worker": "worker 1 sent 'bucket.0' in the name of worker 0",
    "another config": "with another config's fingerprint",
    "another kind": "worker 1 sent NUMBERS, expected another kind of message now",
    "hello again": "worker 1 sent HELLO, expected another kind",
    "twice": "worker 1 sent 'bucket.0' for round 3, late or twice, expected round 4",
    "early": "worker 1 sent 'bucket.0' for round 5, early, expected round 4",
    "another step": "worker 1 sent 'bucket.0' for step 5, expected step 4",
    "damaged": "expected 0x",
    "other numbers": "worker 1 sent 'bucket.0' twice in round 5, expected it once",
    "malformed": "worker 1 sent 'bucket.0' with a malformed body",
}


def test_rogue_messages_are_refused_and_leave_no_trace(in_a_row: dict[str, list[Any]]) -> None:
    results = in_a_row["rogue"]
    answers = results[1]["answers"]
    assert answers.keys() == REFUSALS.keys()
    for name, sentence in REFUSALS.items():
        assert answers[name].startswith("the server refused a message: worker 1 sent "), name
        assert sentence in answers[name]
    assert results[0]["x"] == results[1]["x"] == expected_end()


def expected_end() -> dict[str, Any]:
    """Eight steps that nobody disturbs."""
    x = {"w": np.zeros(2000, np.float32), "b": np.zeros(40, np.float32)}
    run = ef.simulate(
        ef.EF21(ef.TopK(ratio=0.05)),
        lambda rank, x, step: gradients(rank, step)["w"].reshape(-1),
        x["w"],
        workers=2,
        steps=8,
        step_size=1.0,
    )
    for step in range(8):
        both = [gradients(rank, step)["b"] for rank in range(2)]
        x["b"] = x["b"] - (both[0] + both[1]) / np.float32(2)
    return {"w": run.x.reshape(50, 40).tolist(), "b": x["b"].tolist()}


def test_workers_may_end_one_after_the_other_where_a_server_has_no_bucket(tmp_path: Path) -> None:
    results = server_job(2, 2, "server_leaves.py", tmp_path)
    assert [result["sum"] for result in results] == [2000.0] * 2
