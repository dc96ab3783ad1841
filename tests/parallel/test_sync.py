"""PyTorch: ranks that do not start alike are told; Horovod's broadcasts in the right order help."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel

APART = "OutOfSyncError: the parameters of rank 0 and rank 1 differ, expected the same bits"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "sync.py", tmp_path_factory.mktemp("sync"))


@pytest.mark.parametrize("adapter", ["", "stock "])
def test_a_forgotten_broadcast_raises_before_anything_changes(
    adapter: str, results: Results
) -> None:
    for result in results:
        facts = result[f"{adapter}forgotten"]
        assert facts["error"].startswith(APART)
        assert "hvd.broadcast_parameters(model.state_dict(), root_rank=0)" in facts["error"]
        assert facts["kept"]
        assert facts["end"] == results[0][f"{adapter}forgotten"]["end"]


@pytest.mark.parametrize("adapter", ["", "stock "])
def test_a_frozen_backbone_that_was_not_broadcast_raises(adapter: str, results: Results) -> None:
    for result in results:
        assert result[f"{adapter}frozen"].startswith(APART)


@pytest.mark.parametrize("adapter", ["", "stock "])
def test_other_learning_rates_raise_when_they_have_moved_the_ranks_apart(
    adapter: str, results: Results
) -> None:
    for result in results:
        *before, last = result[f"{adapter}rate"]
        assert before == ["", "", ""]  # step 1 has a rate of 0, step 2 shows in the fourth
        assert last.startswith(APART)


def test_the_check_can_be_left_out(results: Results) -> None:
    first, second = (result["without_the_check"] for result in results)
    assert first["error"] == second["error"] == ""
    assert first["end"] != second["end"], "nothing was out of sync: this shows nothing"


def test_parameters_broadcast_before_the_state_of_adamw_raise(results: Results) -> None:
    assert [result["usual_order"]["start"] for result in results] == [True, False]
    for result in results:
        assert result["usual_order"]["error"].startswith(APART)
        assert "state first, parameters last" in result["usual_order"]["error"]


def test_state_first_and_parameters_last_restores_all_ranks(results: Results) -> None:
    for result in results:
        facts = result["state_first"]
        assert facts["error"] == ""
        assert facts["start"]
        assert facts["lr"] == 0.01
        assert facts["end"] == results[0]["state_first"]["end"]


def test_require_in_sync_compares_bits(results: Results) -> None:
    for result in results:
        facts = result["require_in_sync"]
        assert facts["same"] == facts["state"] == facts["alone"] == ""
        for what in ("apart", "named", "sign of a zero"):
            assert facts[what].startswith(APART)
        assert (
            "got something of type int among the parameters, expected tensors"
            in facts["no tensors"]
        )
