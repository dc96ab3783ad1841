"""Rounds that do not wait for a slow worker, and lose nothing of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launching import ended_job, server_job

pytestmark = pytest.mark.parallel

STEPS, NAP = 40, 0.4


@pytest.mark.parametrize(
    ("program", "refused"),
    [
        ("server_quorum.py", "expected one that waits for all workers"),
        (
            "server_torch_quorum.py",
            "synchronize() got a server with a quorum of 3, expected",
        ),
    ],
    ids=["numpy", "torch"],
)
def test_a_slow_worker_does_not_hold_up_the_others(
    program: str, refused: str, tmp_path: Path
) -> None:
    results = server_job(1, 4, program, tmp_path, str(STEPS), server=("--quorum=3",))
    for fast in results[:3]:
        assert fast["seconds"] < 0.7 * STEPS * NAP
        assert refused in fast["refused"]
    assert results[3]["pushes"] < 0.7 * STEPS  # it took part in some of the rounds
    assert all(result["pushes"] > 1 for result in results)
    longest = max((result["rounds"] for result in results), key=len)
    assert len(longest) >= STEPS
    for result in results:  # the same rounds in the same order
        assert len(result["rounds"]) >= STEPS
        assert result["rounds"] == longest[: len(result["rounds"])]
    # Integers, four workers: sums are exact, so nothing is lost at all.
    last = next(result for result in results if result["rounds"] == longest)
    given = {key: sum(np.array(r["given"][key]) for r in results) for key in ("w", "b")}
    errors = sum(np.array(result["error"]) for result in results)
    np.testing.assert_array_equal(4 * np.array(last["applied"]["b"]), given["b"])
    np.testing.assert_array_equal(4 * np.array(last["applied"]["w"]) + errors, given["w"])
    assert np.any(errors)


def test_a_worker_ends_with_answers_on_their_way(tmp_path: Path) -> None:
    limit = {"EF_HOROVOD_TIMEOUT": "60"}  # after which the server would end the job
    early, late = server_job(
        1, 2, "server_quorum_ends.py", tmp_path, server=("--quorum=1",), environment=limit
    )
    assert early["rounds"] <= 2
    assert late["rounds"] >= 11


def test_what_torch_cannot_do_in_rounds(tmp_path: Path) -> None:
    program, quorum = "server_torch_quorum.py", ("--quorum=1",)
    for result in server_job(1, 2, program, tmp_path, "refused", server=quorum):
        scaler, schedule = result["errors"]
        assert scaler.startswith("UnsupportedError: got a grad_scaler and a server with a quorum")
        assert schedule.startswith("UnsupportedError: got 'lr' changed between two steps")


@pytest.mark.parametrize(("servers", "quorum"), [(1, 5), (2, 2)])
def test_impossible_quorums_are_refused(servers: int, quorum: int, tmp_path: Path) -> None:
    options = (f"--quorum={quorum}",)
    output, _ = ended_job(servers, 3, "server_quorum.py", tmp_path, "3", server=options)
    assert f"got a quorum of {quorum} with 3 workers and {servers} servers" in output
