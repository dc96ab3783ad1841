"""CompressedUpdates: the ranks' own optimizers, and the mean of what they changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module", params=[1, 2])
def results(request, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(request.param, "updates.py", tmp_path_factory.mktemp("updates"))


@pytest.fixture(scope="module")
def in_tensorflow(tmp_path_factory: pytest.TempPathFactory, every_case: bool) -> Results:
    which = "all" if every_case else "sample"
    return horovod_job(2, "tf_updates.py", tmp_path_factory.mktemp("updates"), which, timeout=600)


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


def test_schedulers_made_before_or_after_the_wrapping_set_the_rate(results: Results) -> None:
    for result in results:
        before, after = result["scheduled"]["before"], result["scheduled"]["after"]
        assert before == after
        assert before["lr"] == 0.1 / 2**3
        assert before["warnings"] == []


def test_closures_hooks_and_horovods_recipe_for_clipping_make_the_same_steps(
    results: Results,
) -> None:
    for result in results:
        facts = result["called"]
        assert facts["plain"] == facts["closure"] == facts["horovod"]
        assert facts["plain"]["is"]
        assert facts["plain"]["hooks"] == ([3, 3, 3] if len(results) > 1 else [4, 3, 4])
        seen = facts["plain"]["seen"]
        assert seen == results[0]["called"]["plain"]["seen"], "hooks saw one rank's own update"
        assert len(set(seen)) == 3
    if len(results) > 1:
        losses = [result["called"]["plain"]["losses"] for result in results]
        assert losses[0] != losses[1], "the ranks' batches differ"


def test_an_overflow_on_one_rank_lowers_the_loss_scale_on_all(results: Results) -> None:
    for result in results:
        for kind, facts in result["scaled"].items():
            assert facts["scale"] == 2.0**10 / 4, kind
            assert facts["ends"][0] == facts["ends"][1], kind
            assert facts["skipped"] == ([0, 5] if len(results) > 1 else []), kind
    plain, by_user = (facts["ends"][0] for facts in results[0]["scaled"].values())
    assert plain != by_user, "the clipping changed nothing"


def test_broadcasts_logs_sparse_gradients_copies_and_unwrapping(results: Results) -> None:
    first = results[0]["handled"]
    assert first["log"] == [None, 2 if len(results) > 1 else 1]  # one rank counts calls of the log
    for result in results:
        facts = result["handled"]
        assert [facts[name] for name in ("cleared", "unwrapped", "moved")] == [True] * 3
        assert facts["moments"][1] == first["moments"][0], "not those of rank 0"
        assert (facts["end"], facts["table"]) == (first["end"], first["table"])
        if len(results) > 1:
            assert facts["copied"].startswith("UnsupportedError: got a copy of a wrapped optimizer")
    if len(results) > 1:
        assert results[1]["handled"]["moments"][0] != first["moments"][0]


REFUSALS = {
    "momentum": "UnsupportedError: got MomentumCorrection(OneBit(",
    "adam": "UnsupportedError: got FrozenAdam(OneBit()",
    "server": "UnsupportedError: got 0 servers and ",
    "wrapped": "UnsupportedError: got an optimizer that is wrapped already",
    "inside": "UnsupportedError: got an optimizer that is wrapped already",
    "by horovod": "UnsupportedError: got an optimizer that is wrapped already",
    "group": "UnsupportedError: got a new parameter group for a wrapped optimizer",
    "op": "UnsupportedError: got op=1 for updates, expected hvd.Average",
    "adasum": "UnsupportedError: got op=2 for updates, expected hvd.Average",
    "groups": "UnsupportedError: got num_groups=2, expected none",
    "predivide": "UnsupportedError: got gradient_predivide_factor=2.0, expected 1.0",
    "passes": "ValueError: CompressedUpdates got backward_passes_per_step=0",
    "rows": "ValueError: CompressedUpdates got sparse_as_dense=2",
    "none": "UnsupportedError: got compression=None, expected a method",
    "adapter": "UnsupportedError: got compression=<class 'horovod",
}
REFUSALS_OF_SEVERAL_RANKS = {
    "seed": "ConfigMismatchError: ",
    "twice": "UnsupportedError: '0.weight' is averaged by another wrapped optimizer already",
    "again": "UnsupportedError: '0.weight' is averaged by another wrapped optimizer already",
    "frozen": "UnsupportedError: parameter '0.bias' requires no gradient now, unlike when",
    "thawed": "UnsupportedError: parameter '0.weight' requires a gradient now, unlike when",
    "gradients": "ValueError: got a compression state of gradients, expected one of updates",
    "state": "ValueError: got a compression state of compression None, expected",
    "scaler": "UnsupportedError: got step() from a loss scaler that is not found",
}


def test_what_cannot_work_is_refused(results: Results) -> None:
    expected = REFUSALS | (REFUSALS_OF_SEVERAL_RANKS if len(results) > 1 else {})
    for result in results:
        for name, start in expected.items():
            assert result["refusals"][name].startswith(start), name


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
    assert different >= len(first) - 2 >= 4  # tf_keras and eager mode may end as the others do


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


def local(in_tensorflow: Results, scenario: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both ranks found out with three local steps per exchange."""
    first, second = (result["local"][scenario] for result in in_tensorflow)
    return first, second


def test_local_steps_in_tensorflow_give_the_mean_of_the_workers(in_tensorflow: Results) -> None:
    first, second = local(in_tensorflow, "means")
    assert first["off"] < 1e-6
    equal = [a == b for a, b in zip(first["digests"], second["digests"], strict=True)]
    assert equal == [False, False, True]


def test_local_steps_in_tensorflow_end_with_the_same_bits(in_tensorflow: Results) -> None:
    first, second = local(in_tensorflow, "compressed")
    for kind, facts in first.items():
        assert facts["end"] == facts["again"] == second[kind]["end"], kind
        assert facts["before"] != second[kind]["before"], kind
        assert (facts["steps"], facts["taken"], facts["skipped"]) == (7, 7, 0), kind
        numbers = 40 * 60 + 7 + 50 * 30
        assert facts["dense"] == 7 * 4 * numbers, kind
        most = 0.3 if kind == "double_pass" else 0.1  # its answers are uncompressed
        assert facts["wire"] < facts["dense"] * most, kind
    first, second = local(in_tensorflow, "corners")
    assert first == second
    assert first["steps"] == 4  # of eight calls
    assert first["least"] == 0 < first["zeros"]


def test_nans_in_local_steps_in_tensorflow(in_tensorflow: Results) -> None:
    first, second = local(in_tensorflow, "spoiled")
    assert (first["stood"], second["stood"]) == (False, True)
    assert first["good"] == second["good"] == first["back"] == second["back"]
    assert (first["skipped"], second["skipped"]) == (2, 3)  # an exchange of two steps; one more
    assert (first["steps"], second["steps"]) == (3, 2)
    assert first["taken"] == second["taken"] == 3
    first, second = local(in_tensorflow, "scaled")
    for kind in ("keras", "tf_keras"):
        assert (first[kind]["scale"], second[kind]["scale"]) == (2.0**15, 2.0**14), kind
        assert first[kind]["end"] == second[kind]["end"], kind


def test_tensorflow_goes_on_between_two_exchanges(in_tensorflow: Results) -> None:
    first, second = local(in_tensorflow, "resumed")
    assert first == second
    assert first["whole"] == first["again"]
    assert first["exchanged"] != first["next"]
    assert first["counts"] == [9, 9, 5, 6]
    assert first["one"].startswith("ValueError: got a compression state after 2 local steps, exp")


def test_fit_exchanges_before_anybody_looks_at_the_weights(in_tensorflow: Results) -> None:
    first, second = local(in_tensorflow, "fitted")
    assert first == second
    for kind, steps in (("keras", 13), ("tf_keras", 12)):
        assert first[kind]["steps"] == steps, kind
        assert len(first[kind]["losses"]) == 3
        start, test, end, *others = first[kind]["seen"]
        assert start != test == end
        assert len({start, end, *others}) == 5, kind


def test_local_steps_that_cannot_work_in_tensorflow_are_refused(in_tensorflow: Results) -> None:
    for facts in local(in_tensorflow, "refusals"):
        assert "got the state for any number of ranks after 1 of 3 local steps" in facts["save"]
        assert "got gradients of 1 variables with local_steps=3, expected those" in facts["set"]
        assert "UnsupportedError: got exchange() inside a tf.function, expected" in facts["graph"]
        assert facts["steps"].startswith("ValueError: CompressedUpdates got local_steps=0")
        assert "local_steps=2" in facts["unlike"]
        assert "local_steps=3" in facts["unlike"]


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
