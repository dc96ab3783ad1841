"""Variance-reduced estimates in a training loop, with `ef.EstimatedGradient`."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel
CASES = ("STORM", "ROOT-SGD", "IGT", "PAGE", "plain")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "estimators.py", tmp_path_factory.mktemp("estimators"))


@pytest.mark.parametrize("case", CASES)
def test_training_takes_the_steps_of_a_simulation(case: str, results: Results) -> None:
    first, second = (result[case] for result in results)
    assert first["end"] == second["end"], "the ranks' parameters differ"
    assert first["difference"] < 1e-5 < 0.05 < first["moved"]
    assert sum(first["losses"][-5:]) < sum(first["losses"][:5])


@pytest.mark.parametrize("case", CASES)
def test_a_dropped_step_is_taken_again_at_the_same_points(case: str, results: Results) -> None:
    for result in results:
        assert result[case]["skipped"] == 1
        assert result[case]["dropped"], "the run with a dropped step ends elsewhere"


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_as_an_uninterrupted_one(case: str, results: Results) -> None:
    assert all(result[case]["resumed"] for result in results)


def test_parameters_that_stay_dense_are_averaged_too(results: Results) -> None:
    """ErrorCompensatedX averages over steps, and STORM's estimates are too large without that."""
    for result in results:
        assert result["dense_parameters"]["difference"] < 1e-6
        assert result["dense_parameters"]["moved"] > 0.01


def test_both_points_of_a_step_see_the_same_dropout(results: Results) -> None:
    for result in results:
        assert result["dropout"] == {"calls": 5, "same": True, "fresh": True}


@pytest.mark.parametrize(
    ("what", "way_out"),
    [
        ("plain", "start the job with horovodrun -np 2"),
        ("alpha", "expected a method that averages with alpha=Decay"),
        ("passes", "expected 1 and none"),
    ],
)
def test_what_cannot_work_is_refused(what: str, way_out: str, results: Results) -> None:
    for result in results:
        assert way_out in result["refused"][what]
