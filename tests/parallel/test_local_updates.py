"""CompressedUpdates with local steps: the invariants of DiLoCo and SparseLoCo, and failures."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job, server_job

pytestmark = pytest.mark.parallel
EVERY = 5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "local_updates.py", tmp_path_factory.mktemp("local"))


def test_without_compression_parameters_are_the_mean_of_the_workers_own(results: Results) -> None:
    first, second = (result["means"] for result in results)
    assert first["off"] < 1e-6
    equal = [a == b for a, b in zip(first["digests"], second["digests"], strict=True)]
    assert equal == [False] * (EVERY - 1) + [True]


def test_one_local_step_of_sgd_is_error_feedback_with_the_step_inside(results: Results) -> None:
    for result in results:
        assert result["one_step"]["off"] < 1e-5 < 0.1 < result["one_step"]["moved"]


def test_all_ranks_have_the_same_bits_after_each_exchange(results: Results) -> None:
    first, second = (result["compressed"] for result in results)
    for exchange, facts in first.items():
        assert facts["end"] == facts["again"] == second[exchange]["end"], exchange
        assert facts["before"] != second[exchange]["before"], exchange


def test_bytes_and_steps_are_counted_per_step(results: Results) -> None:
    steps = 2 * EVERY + 2
    for result in results:
        for exchange, facts in result["compressed"].items():
            assert facts["steps"] == [steps, steps], exchange
            assert facts["ratio"] == facts["wire"] / facts["dense"] < 0.2 / 4, exchange
    numbers = 40 * 60 + 60 + 60 * 50 + 50 + 50 * 10 + 10 + 1
    assert results[0]["compressed"]["gather"]["dense"] == steps * 4 * numbers


def test_a_nan_costs_its_rank_a_step_and_in_a_change_all_ranks_an_exchange(
    results: Results,
) -> None:
    first, second = (result["spoiled"] for result in results)
    assert first["skipped"] == [False] * EVERY
    assert second["skipped"] == [False, True, False, False, True]
    assert first["good"] == second["good"] == first["back"] == second["back"]
    assert first["dropped"]
    assert second["dropped"]
    assert (first["counted"], second["counted"]) == (EVERY - 1, EVERY + 1)
    assert first["steps"] == second["steps"] == EVERY


def test_loss_scales_are_each_ranks_own(results: Results) -> None:
    first, second = (result["scaled"] for result in results)
    assert (first["scale"], second["scale"]) == (2.0**10, 2.0**9)
    assert first["end"] == second["end"]
    assert first["skipped"] == [False] * EVERY
    assert second["skipped"] == [False, False, True, False, False]


def test_a_run_goes_on_between_two_exchanges(results: Results) -> None:
    first, second = (result["resumed"] for result in results)
    assert first["whole"] == first["again"] == second["whole"]
    assert first["steps"] == [3 * EVERY] * 3


def test_a_step_that_raised_leaves_nothing_behind(results: Results) -> None:
    for result in results:
        facts = result["failed"]
        assert facts["raised"].startswith("MemoryError")
        assert facts["ends"][0] == facts["ends"][1] == results[0]["failed"]["ends"][0]


def test_a_server_makes_the_same_steps(
    results: Results, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ends = server_job(1, 2, "server_updates.py", tmp_path_factory.mktemp("server"))
    for end, result in zip(ends, results, strict=True):
        assert end["end"] == result["compressed"]["gather"]["end"]
        assert end["steps"] == result["compressed"]["gather"]["steps"]


def test_what_cannot_work_is_refused(results: Results) -> None:
    for result in results:
        facts = result["refusals"]
        assert facts["unwrap"].startswith("RuntimeError: got unwrap() after 1 of 5 local steps")
        assert "got the state for any number of ranks after 1 of 5 local steps" in facts["save"]
        assert "expected one right after an exchange for local_steps=1" in facts["single"]
        assert "after 1 local steps of 7 parameters, expected the names" in facts["other"]
        assert "got an exchange after 1 local steps on rank 0 and 2 on rank 1" in facts["uneven"]
        assert facts["steps"].startswith("ValueError: CompressedUpdates got local_steps=0")
        assert facts["decay"].startswith("ValueError: ErrorFeedback got decay=0, expected a numb")
        assert "local_steps=2" in facts["unlike"]
        assert "local_steps=3" in facts["unlike"]
