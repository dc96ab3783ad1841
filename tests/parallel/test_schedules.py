"""What changes with the step, on real ranks of both frameworks; and two methods in one model."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel

N = 4  # dense steps in the programs, or steps with a larger ratio


@pytest.fixture(scope="module", params=["schedules.py", "tf_schedules.py"])
def results(request, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, request.param, tmp_path_factory.mktemp("schedules"))


def test_the_first_steps_send_more_than_the_later_ones(results: Results) -> None:
    for result in results:
        for kind, facts in result["kinds"].items():
            first, later = set(facts["sent"][:N]), set(facts["sent"][N:])
            assert len(first) == len(later) == 1, kind
            assert max(later) < 0.6 * max(first), kind


def test_all_ranks_end_with_the_same_bits(results: Results) -> None:
    for kind, facts in results[0]["kinds"].items():
        assert all(result["kinds"][kind]["digest"] == facts["digest"] for result in results), kind


def test_each_method_of_a_policy_is_in_use(results: Results) -> None:
    for result in results:
        kinds = [kind for kind in result["kinds"] if kind.startswith("two methods")]
        assert kinds
        for kind in kinds:
            methods = " ".join(result["kinds"][kind]["methods"])
            assert "EF21(TopK(ratio=0.05))" in methods
            assert "ErrorFeedback(TopK(ratio=0.05))" in methods


def test_a_run_resumed_in_either_phase_ends_as_an_uninterrupted_one(results: Results) -> None:
    for result in results:
        for kind, (whole, again) in result["resumed"].items():
            assert whole == again, kind


def test_ranks_with_other_numbers_of_dense_steps_are_found(results: Results) -> None:
    for result in results:
        assert result["differs"].startswith("ConfigMismatchError: rank 0 has ")
        assert "dense_steps=0" in result["differs"]
        assert "dense_steps=1" in result["differs"]


def test_ranks_with_other_methods_for_a_parameter_are_found(results: Results) -> None:
    for result in results:
        found = result["policy differs"]
        assert found.startswith("ConfigMismatchError: rank 0 has parameter '")
        assert found.count("by its own method EF21(TopK(ratio=0.05))") == 2


def test_in_pytorch_dense_steps_are_those_of_no_compression(results: Results) -> None:
    for off, moved in [result["as dense"] for result in results if "as dense" in result]:
        assert off < 1e-6 < moved


def test_in_tensorflow_a_bad_step_in_either_phase_is_dropped(results: Results) -> None:
    for calm, found, skipped in [result["bad"] for result in results if "bad" in result]:
        assert calm == found
        assert skipped == 2
