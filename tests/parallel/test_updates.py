"""CompressedUpdates: the ranks' own optimizers, and the mean of what they changed."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module", params=[1, 2])
def results(request, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(request.param, "updates.py", tmp_path_factory.mktemp("updates"))


def test_without_compression_sgd_with_momentum_is_that_of_averaged_gradients(
    results: Results,
) -> None:
    for result in results:
        facts = result["without_compression"]
        assert facts["off"] < 1e-6 < 0.1 < facts["moved"]


def test_all_ranks_end_with_the_same_bits_and_send_less(results: Results) -> None:
    for kind, facts in results[0]["compressed"].items():
        assert all(r["compressed"][kind]["digest"] == facts["digest"] for r in results), kind
        if len(results) > 1:
            assert facts["ratio"] < (0.6 if "dense_steps" in kind else 0.2), kind
    ends = {facts["digest"] for facts in results[0]["compressed"].values()}
    assert len(ends) == (6 if len(results) > 1 else 2)  # one rank compresses nothing


def test_a_nan_on_one_rank_leaves_the_step_out_on_all(results: Results) -> None:
    for result in results if len(results) > 1 else ():
        facts = result["spoiled"]
        assert facts["skipped"] == [0, 5]
        assert facts["model"] == facts["calm"]


def test_a_resumed_run_ends_as_an_uninterrupted_one(results: Results) -> None:
    for result in results:
        assert result["resumed"]["whole"] == result["resumed"]["again"]


def test_what_cannot_work_is_refused(results: Results) -> None:
    for result in results:
        facts = result["refusals"]
        assert facts["momentum"].startswith("UnsupportedError: got MomentumCorrection(OneBit(")
        assert facts["adam"].startswith("UnsupportedError: got FrozenAdam(OneBit()")
        assert facts["server"].startswith("UnsupportedError: got exchange='server' for updates")
        assert facts["state"].startswith("ValueError: got a state with ['a'], expected")
        if len(results) > 1:
            assert facts["seed"].startswith("ConfigMismatchError: ")
            assert "is averaged by another wrapped optimizer already" in facts["twice"]
