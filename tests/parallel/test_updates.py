"""CompressedUpdates: the ranks' own optimizers, and the mean of what they changed."""

from __future__ import annotations

import numpy as np
import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module", params=[1, 2])
def results(request, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(request.param, "updates.py", tmp_path_factory.mktemp("updates"))


@pytest.fixture(scope="module")
def in_tensorflow(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "tf_updates.py", tmp_path_factory.mktemp("updates"))


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
        assert facts["counted"] == 2
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


def test_tensorflow_without_compression(in_tensorflow: Results) -> None:
    for result in in_tensorflow:
        facts = result["without_compression"]
        assert facts["off"] < 1e-6 < 0.1 < facts["moved"]


def test_tensorflow_ends_with_the_same_bits_on_all_ranks(in_tensorflow: Results) -> None:
    first, second = (result["compressed"] for result in in_tensorflow)
    assert first == second
    for kind, facts in first.items():
        assert facts["ratio"] < (0.6 if "dense_steps" in kind else 0.2), kind
    different = len({facts["digest"] for facts in first.values()})
    assert different >= 6  # tf_keras and eager mode may end as Keras 3 and a graph do


def test_both_frameworks_make_the_same_steps_of_the_same_gradients(
    results: Results, in_tensorflow: Results
) -> None:
    if len(results) < 2:
        return
    for ours, theirs in zip(in_tensorflow, results, strict=True):
        for name, facts in ours["of_given_gradients"].items():
            other = theirs["of_given_gradients"][name]
            assert facts["bytes"] == other["bytes"], name
            end, expected = np.array(facts["end"]), np.array(other["end"])
            assert np.abs(end - expected).max() < 1e-6 < 0.01 < np.abs(end).max(), name


def test_tensorflow_leaves_a_step_with_a_nan_out_on_all_ranks(in_tensorflow: Results) -> None:
    first, second = (result["spoiled"] for result in in_tensorflow)
    assert first == second
    for kind, facts in first.items():
        assert facts["skipped"] == 2, kind
        # tf_keras' scaler counts steps that it leaves out, which changes Adam's corrections
        assert (facts["model"] == facts["calm"]) == (kind != "tf_keras scaled"), kind
    assert first["scaled"]["scale"] == first["tf_keras scaled"]["scale"] == 2.0**15 / 4


def test_tensorflow_goes_on_from_files(in_tensorflow: Results) -> None:
    first, second = (result["resumed"] for result in in_tensorflow)
    assert first["whole"] == first["again"] == second["whole"] == second["again"]
    assert first["moments"] != second["moments"]


def test_fit_again_keeps_the_moments_of_each_rank(in_tensorflow: Results) -> None:
    first, second = (result["fitted"] for result in in_tensorflow)
    assert first["one"] == first["two"] == second["one"]
    assert "ef_bytes" in first["logs"]


def test_accumulation_constraints_and_rows_in_keras(in_tensorflow: Results) -> None:
    first, second = (result["corners"] for result in in_tensorflow)
    assert first == second
    assert first["steps"] == 4  # of eight calls
    assert first["least"] == 0 < first["zeros"]
    assert {1, 2, 30} <= set(first["changed rows"])


def test_what_cannot_work_in_tensorflow_is_refused(in_tensorflow: Results) -> None:
    for result in in_tensorflow:
        facts = result["refusals"]
        assert facts["momentum"].startswith("UnsupportedError: got MomentumCorrection(OneBit(")
        assert facts["adam"].startswith("UnsupportedError: got FrozenAdam(OneBit()")
        assert facts["server"].startswith("UnsupportedError: got exchange='server' for updates")
        assert facts["compressor"].startswith("UnsupportedError: got compression=OneBit(), expect")
        assert "got an optimizer that is wrapped already" in facts["twice"]
        assert "got an optimizer with use_ema=True for updates" in facts["average"]
        assert "got jit_compile=True around an exchange" in facts["jit"]
        assert "write ef.CompressedUpdates(keras.optimizers.LossScaleO" in facts["inside"]
        assert "got ef.CompressedUpdates inside a loss scaler" in facts["inside of tf_keras"]
        assert "ConfigMismatchError: rank 0 has updates, exchange='auto', seed=0" in facts["seed"]
        assert "rank 0 has gradients, exchange" in facts["beside"]
