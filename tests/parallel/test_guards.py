"""Ranks that disagree, a gradient that is not finite, a rank that is missing: never silent."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel


ADAPTERS = ("ef", "stock")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(3, "guards.py", tmp_path_factory.mktemp("guards"), *ADAPTERS)


@pytest.fixture(params=ADAPTERS)
def results(request: pytest.FixtureRequest, of_ranks: Results) -> Results:
    return [of_rank[request.param] for of_rank in of_ranks]


@pytest.mark.parametrize(
    ("scenario", "first", "second"),
    [
        ("another_compressor", "ratio=0.01", "ratio=0.02"),
        ("another_shape", "60", "61"),
        ("another_name", "'a.", "'b."),
    ],
)
def test_ranks_that_disagree_are_told_on_every_rank(
    scenario: str, first: str, second: str, results: Results
) -> None:
    for result in results:
        error = result[scenario]
        assert error.startswith("ConfigMismatchError: rank 0 has ")
        here, _, there = error.partition("rank 1 has")
        assert first in here
        assert second in there


def test_a_gradient_that_is_not_finite_drops_the_step_on_all_ranks(results: Results) -> None:
    for result in results:
        step = result["not_finite"]
        assert step["kept"] == [True, True], "parameters, momentum or memories changed"
        assert step["skipped"] == 2
        assert step["after"] != step["before"], "training did not go on"
        assert step["after"] == results[0]["not_finite"]["after"]


def test_a_wait_ends_with_a_message(results: Results) -> None:
    for rank in (0, 2):
        seconds, _, error = results[rank]["missing_rank"].partition(" ")
        assert 3.0 <= float(seconds) < 6.0
        assert error.startswith(f"CollectiveTimeoutError: rank {rank} of 3 waited 3 s in 'ef")
