"""The mpi4py transport under mpirun."""

from __future__ import annotations

import pytest
from launching import Results, mpirun

pytestmark = pytest.mark.parallel


@pytest.fixture(
    scope="module",
    params=[1, 3, *(pytest.param(ranks, marks=pytest.mark.exhaustive) for ranks in (2, 4))],
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return mpirun(request.param, "mpi_ranks.py", tmp_path_factory.mktemp("mpi"))


def test_buffers_of_unequal_sizes_are_gathered_in_rank_order(results: Results) -> None:
    expected = [list(range(3 * rank + 1)) for rank in range(len(results))]
    for result in results:
        assert result["unequal_sizes"] == expected


def test_collectives_are_matched_by_name_not_by_order(results: Results) -> None:
    for result in results:
        for i in range(4):
            expected = [[10 * rank + i] * 5 for rank in range(len(results))]
            assert result["any_order"][f"x{i}"] == expected


def test_tags_are_few_and_no_two_names_share_one(results: Results) -> None:
    ranks = range(len(results))
    expected = {
        "plumless": [[10 * rank] * 5 for rank in ranks],
        "buckeroo": [[10 * rank + 1] * 5 for rank in ranks],
        "sum": [sum(ranks)],
    }
    for result in results:
        assert result["few_tags"]["found"] == [expected, expected]
        assert result["few_tags"]["largest"] == 4
        problem = "got 'the fifth' as name number 5 of a collective, expected at most 4, MPI's"
        assert problem in result["few_tags"]["too_many"]
        assert "got MPI.COMM_NULL, expected a communicator" in result["few_tags"]["nobody"]


def test_long_buffers_travel_in_pieces(results: Results) -> None:
    ranks = range(len(results))
    for result in results:
        for length, (gathered, total) in zip((1, 3, 4, 5, 8, 9), result["pieces"], strict=True):
            assert gathered == [[rank] * (length + rank) for rank in ranks]
            assert total == [sum(ranks)] * (length * len(results) + 1)


def test_sums_are_right_and_equal_on_all_ranks(results: Results) -> None:
    for result in results:
        for length, total in result["sums"].items():
            assert total["error"] < 1e-5
            assert total["bytes"] == results[0]["sums"][length]["bytes"]


def test_a_channel_over_mpi_is_the_simulation(results: Results) -> None:
    for result in results:
        for method, end in result["training"].items():
            assert end["same"], method
            assert end["bytes"][0] == end["bytes"][1]


def test_what_mpi_would_get_wrong_is_refused(results: Results) -> None:
    for result in results:
        assert "expected float32 or float64" in result["refused"]["float16"]
        assert "started 'twice' twice" in result["refused"]["twice"]


def test_sums_of_unequal_lengths_are_refused(results: Results) -> None:
    for rank, result in enumerate(results if len(results) > 1 else []):
        left = (rank - 1) % len(results)
        problem = (
            f"rank {left} sends {4 * (10 + left)} bytes of the sum 'sum' where rank {rank} has"
        )
        assert result["unequal_sums"].startswith(f"ConfigMismatchError: {problem}")


def test_a_missing_rank_is_named_in_time(results: Results) -> None:
    last = len(results) - 1
    for rank, result in enumerate(results[:-1]):
        missing = result["missing_rank"]
        assert 3.0 <= missing["seconds"] < 5.0  # two waits of 1.5 s
        assert f"rank {rank} waited 1.5 s in 'late' for ranks [{last}]" in missing["gather"]
        assert "waited 1.5 s in 'sum' for ranks" in missing["reduce"]
        assert missing["again"] == missing["gather"], "what comes late is not taken for the next"


def test_disagreement_names_both_ranks(results: Results) -> None:
    if len(results) < 3:  # rank 2 is the first that disagrees
        assert all("disagreement" not in result for result in results)
    for result in results if len(results) > 2 else []:
        assert "rank 0 has mine 0 and rank 2 has mine 1" in result["disagreement"]
