"""The double pass in PyTorch: 2, 3 and 4 ranks stay equal, drop steps together, and resume."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


@pytest.fixture(
    scope="module",
    params=[3, *(pytest.param(ranks, marks=pytest.mark.exhaustive) for ranks in (2, 4))],
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("double_pass")
    return horovod_job(request.param, "double_pass.py", out, str(request.param), timeout=600)


def test_parameters_are_equal_on_all_ranks_after_40_steps(results: Results) -> None:
    first = results[0]["trainings"]
    assert len(first) == 10
    for method, end in first.items():
        assert end["start"] != end["end"]
        assert end["loss"] < 2.1, f"{method} did not learn"  # at the start it is about log(10)
        for rank, result in enumerate(results):
            assert result["trainings"][method]["end"] == end["end"], f"{method}: rank {rank}"


def test_the_numbers_and_bytes_are_those_of_one_process(results: Results) -> None:
    for result in results:
        assert len(result["as_in_one_process"]["same"]) == 8
        assert all(result["as_in_one_process"]["same"].values())
    for method, (*_, simulated) in results[0]["as_in_one_process"]["sent"].items():
        sent = [result["as_in_one_process"]["sent"][method][0] for result in results]
        received = [result["as_in_one_process"]["sent"][method][1] for result in results]
        assert sum(sent) == sum(received)
        assert sum(sent) // len(sent) == simulated, method


def test_a_gradient_that_is_not_finite_drops_the_step_on_all_ranks(results: Results) -> None:
    for result in results:
        for adapter, facts in result["not_finite"].items():
            assert facts["kept"], f"{adapter}: parameters or memories changed"
            assert facts["skipped"] == 1
            assert facts["end"] != facts["before"], "training did not go on"
            assert facts["end"] == results[0]["not_finite"][adapter]["end"]


def test_a_resumed_run_ends_as_an_uninterrupted_one(results: Results) -> None:
    for rank, result in enumerate(results):
        assert result["resumed"]["whole"] == result["resumed"]["again"]
        assert result["resumed"]["whole"] == results[0]["resumed"]["whole"]
        workers = [f"slice.{j}.worker.error" for j in range(len(results))]
        assert result["resumed"]["held"] == sorted([*workers, f"slice.{rank}.server.error"])


def test_only_the_ranks_of_a_set_train_together(results: Results) -> None:
    first, *others, last = (result["process_set"] for result in results)
    assert first == last
    assert all(other["ef"] != first["ef"] for other in others)


def test_what_cannot_work_is_refused_with_the_way_out(results: Results) -> None:
    for result in results:
        *matrices, disagreement = result["refused"]
        for error in matrices:
            assert error.startswith("UnsupportedError: got exchange='double_pass' with PowerSGD")
            assert "use exchange='auto'" in error
        assert disagreement.startswith("ConfigMismatchError: rank 0 has exchange='double_pass'")


def test_a_wait_ends_with_a_message(results: Results) -> None:
    for rank, result in enumerate(results[:-1]):
        seconds, _, error = result["missing_rank"].partition(" ")
        assert 3.0 <= float(seconds) < 8.0
        start = f"CollectiveTimeoutError: rank {rank} of {len(results)} waited 3 s in 'ef"
        assert error.startswith(start)
