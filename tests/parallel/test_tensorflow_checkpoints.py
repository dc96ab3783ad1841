"""Trainings saved and resumed in another process, by all the ways that TensorFlow users have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import Results, alone, horovod_job

pytestmark = pytest.mark.parallel

WAYS = [
    "Loop-ef21", "Loop-random", "Loop-top", "AmidAccumulation-ef21", "Tape-ef21", "Stock-ef21",
    "Pickle-ef21", "Pickle-random", "Weights-ef21", "WholeModel-ef21", "AccumulatingModel-ef21",
    "Backup-ef21", "TFKeras-ef21",
]  # fmt: skip
MORE = ["Tape-random", "Stock-random", "Weights-random", "WholeModel-random", "TFKeras-random"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def ways(every_case: bool) -> list[str]:
    return WAYS + MORE if every_case else WAYS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, saved: Path, ways: list[str]) -> Results:
    """Trainings that went on without a stop after they were saved."""
    out = tmp_path_factory.mktemp("whole")
    return horovod_job(2, "tf_checkpoints.py", out, "save", str(saved), *ways)


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory, saved: Path, whole: Results, ways: list[str]
) -> Results:
    out = tmp_path_factory.mktemp("resumed")
    return horovod_job(2, "tf_checkpoints.py", out, "resume", str(saved), *ways)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, saved: Path, whole: Results) -> dict[str, Any]:
    return alone("tf_plain_load.py", tmp_path_factory.mktemp("plain"), str(saved))


@pytest.mark.parametrize(
    "way", [*WAYS, *(pytest.param(way, marks=pytest.mark.exhaustive) for way in MORE)]
)
def test_a_resumed_training_ends_as_an_uninterrupted_one(
    way: str, whole: Results, resumed: Results
) -> None:
    ends = {result["ends"][way] for result in (*whole, *resumed)}
    assert len(ends) == 1


def test_every_way_to_save_is_tried_and_moves_the_parameters(
    whole: Results, resumed: Results, ways: list[str]
) -> None:
    for result in (*whole, *resumed):
        assert list(result["ends"]) == ways
    # The same steps by optimizer, tape, pickle and fit; other methods and models end elsewhere.
    ends = whole[0]["ends"]
    assert ends["Loop-ef21"] == ends["Tape-ef21"] == ends["Weights-ef21"]
    assert len({ends[way] for way in ("Loop-ef21", "Loop-random", "Loop-top", "Backup-ef21")}) == 4


def test_without_the_memories_training_goes_elsewhere(whole: Results, resumed: Results) -> None:
    for before, after in zip(whole, resumed, strict=True):
        assert after["without_memories"] != before["ends"]["Pickle-ef21"]


def test_without_the_step_random_compressors_draw_other_entries(
    whole: Results, resumed: Results
) -> None:
    for before, after in zip(whole, resumed, strict=True):
        assert after["without_the_step"] != before["ends"]["Pickle-random"]


def test_rank_0_s_checkpoint_on_all_ranks_starts_memories_from_zero_with_a_warning(
    resumed: Results,
) -> None:
    for result in resumed:
        facts = result["of_rank_0"]
        assert facts["end"] == result["without_memories"] == resumed[0]["without_memories"]
        assert facts["step"] == 6, "the steps were counted from the checkpoint's on"
    first, second = (result["of_rank_0"]["warnings"] for result in resumed)
    assert len(first) == len(second) == 1
    assert "starts from zero on rank 0: other ranks could not load theirs" in first[0]
    assert "starts from zero on rank 1: got a compression state of rank 0, expected 1" in second[0]
    assert "let every rank save and restore its own checkpoint" in second[0]


def test_a_checkpoint_of_another_method_starts_memories_from_zero(resumed: Results) -> None:
    for result in resumed:
        (warning,) = result["of_another_method"]["warnings"]
        assert "expected 'ErrorFeedback(TopK(" in warning
    assert resumed[0]["of_another_method"]["end"] == resumed[1]["of_another_method"]["end"]


def test_a_checkpoint_that_does_not_fit_a_training_under_way_raises(
    whole: Results, resumed: Results
) -> None:
    for rank, result in enumerate(resumed):
        facts = result["after_the_first_step"]
        expected = f"ValueError: got a compression state of rank {1 - rank}, expected {rank}"
        assert facts["error"].startswith(expected)
        assert facts["again"] == facts["end"] == whole[rank]["ends"]["Loop-ef21"]


def test_loading_another_rank_s_state_by_hand_raises_on_all_ranks(resumed: Results) -> None:
    errors = [result["one_rank_loads_anothers"] for result in resumed]
    assert all(error.startswith("ValueError") for error in errors)
    assert "other ranks could not load theirs" in errors[0]
    assert "of rank 0, expected 1; load each rank's own file" in errors[1]


def test_broadcasts_of_optimizer_variables_leave_memories_alone(resumed: Results) -> None:
    first, second = (result["broadcast"] for result in resumed)
    assert first["after"] == first["before"] != second["before"] == second["after"]
    assert first["variables"] == second["variables"], "nothing was broadcast"


def test_another_number_of_ranks_starts_memories_from_zero(
    tmp_path: Path, saved: Path, whole: Results
) -> None:
    results = horovod_job(3, "tf_checkpoints.py", tmp_path, "more_ranks", str(saved))
    assert len({result["end"] for result in results}) == 1
    for rank, result in enumerate(results):
        (warning,) = result["warnings"]
        assert f"error-feedback state starts from zero on rank {rank}" in warning
    assert "of size 2, expected 3" in results[0]["warnings"][0]


def test_saved_models_load_where_this_package_is_unknown(plain: dict[str, Any]) -> None:
    assert plain["imported"] == []
    facts = plain["whole_model"]
    assert facts["is_sgd"], facts["class"]
    assert facts["iterations"] == 6
    assert facts["learns"]
    assert facts["warnings"] == plain["weights"]["warnings"] == []
    assert plain["weights"]["iterations"] == 6


def test_saved_models_keep_the_optimizer_s_variables(plain: dict[str, Any], whole: Results) -> None:
    assert plain["whole_model"]["momentum"] == whole[0]["momentum"]["WholeModel-ef21"]
    facts = plain["accumulating"]
    assert facts["momentum"] == whole[0]["momentum"]["AccumulatingModel-ef21"]
    assert (facts["passes"], facts["iterations"]) == (2, 3)
    assert facts["warnings"] == []
