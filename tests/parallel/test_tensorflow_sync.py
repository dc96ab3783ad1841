"""TensorFlow: ranks that train apart are told; the callback keeps them together and reports."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from launching import Results, horovod_job

from ef_horovod.training.log_file import read_log

pytestmark = pytest.mark.parallel

OUT_OF_SYNC = "the parameters of rank 0 and rank 1 differ, expected the same bits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tf_sync")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return horovod_job(2, "tf_sync.py", folder)


@pytest.mark.parametrize("family", ["keras", "tf_keras"])
def test_an_optimizer_that_is_not_wrapped_raises(family: str, results: Results) -> None:
    for result in results:
        error = result["not_wrapped"][family]
        assert error.startswith(f"OutOfSyncError: {OUT_OF_SYNC}")
        assert "check that the optimizer or the tape is wrapped" in error


@pytest.mark.parametrize("way", ["keras", "tf_keras", "tape", "eager tape"])
def test_first_values_that_differ_raise_without_a_callback(way: str, results: Results) -> None:
    for result in results:
        error = result["not_broadcast"][way]
        assert f"OutOfSyncError: {OUT_OF_SYNC}" in error  # a graph wraps it into its own error
        assert "ef.broadcast_variables" in error


def test_a_broadcast_after_the_first_batch_is_in_time(results: Results) -> None:
    first, second = (result["broadcast_after_the_first_batch"] for result in results)
    assert first["before"] != second["before"]
    assert first["end"] == second["end"]


def test_the_check_can_be_left_out(results: Results) -> None:
    first, second = (result["without_the_check"] for result in results)
    assert first["errors"] == second["errors"] == ["", ""]
    for mine, other in zip(first["ends"], second["ends"], strict=True):
        assert mine != other, "nothing was out of sync: this shows nothing"


def test_require_in_sync_compares_bits(results: Results) -> None:
    for result in results:
        facts = result["require_in_sync"]
        assert facts["same"] == ""
        assert facts["apart"].startswith("OutOfSyncError")
        assert facts["sign of a zero"].startswith("OutOfSyncError")


def test_the_callback_broadcasts_what_one_rank_has(results: Results) -> None:
    first, root = (result["callback"] for result in results)
    for what in ("weights", "optimizer"):
        assert first["before"][what] != root["before"][what]
        assert first["start"][what] == root["start"][what] == root["before"][what]
    assert first["end"] == root["end"]


def test_random_layers_keep_their_own_seeds(results: Results) -> None:
    seeds = [result["callback"]["start"]["seed"] for result in results]
    assert [seed[0] for seed in seeds] == [100, 101]


def test_metrics_become_means_over_ranks(results: Results) -> None:
    first, second = (result["callback"] for result in results)
    for epoch in range(2):
        for metric in ("loss", "accuracy"):
            mine, other = (result["alone"][epoch][metric] for result in (first, second))
            mean = (mine + other) / 2
            assert first["averaged"][epoch][metric] == pytest.approx(mean, rel=1e-12)
            assert first["history"][metric][epoch] == second["history"][metric][epoch]
    losses = [result["alone"][0]["loss"] for result in (first, second)]
    assert losses[0] != losses[1], "ranks had equal losses: this shows nothing"


def test_metrics_are_left_alone_on_request(results: Results) -> None:
    facts = [result["metrics_left_alone"] for result in results]
    assert facts[0]["alone"] != facts[1]["alone"]
    assert all(fact["history"] == fact["alone"] for fact in facts)


def test_metrics_of_one_rank_only_are_not_averaged_but_said(results: Results) -> None:
    for result in results:
        (warning,) = result["metrics_that_differ"]
        assert "give all ranks the same metrics and validation data" in warning


def check_compression_logs(history: dict, batches: int, sent: float | None = None) -> None:
    assert all(number > 0 for number in history["ef_bytes"])
    assert all(0 < number < 0.4 for number in history["ef_ratio"])
    assert all(0 < number < 1 for number in history["ef_error"])
    assert history["ef_skipped"] == [0.0, 0.0]
    assert sent is None or sum(history["ef_bytes"]) * batches == sent


def test_logs_say_what_was_sent(results: Results) -> None:
    for result in results:
        facts = result["callback"]
        check_compression_logs(facts["history"], 4, facts["sent"])


def test_logs_count_skipped_steps_of_each_epoch(results: Results) -> None:
    """A skipped step has sent its bytes too: a step costs as many as without a NaN."""
    for result in results:
        facts = result["skipped_steps"]
        assert facts["skipped"] == [1.0, 1.0]
        assert facts["bytes"] == result["tensorboard"]["history"]["ef_bytes"]
        assert facts["end"] == results[0]["skipped_steps"]["end"]


def test_tensorboard_shows_them(results: Results) -> None:
    for result in results:
        facts = result["tensorboard"]
        assert set(facts["events"]) == {
            "epoch_ef_bytes", "epoch_ef_ratio", "epoch_ef_error", "epoch_ef_skipped"
        }  # fmt: skip
        for tag, values in facts["events"].items():
            expected = facts["history"][tag.removeprefix("epoch_")]
            assert values == pytest.approx(expected, rel=1e-6)  # float32 in the file


def test_the_callback_works_for_tf_keras(results: Results) -> None:
    first, second = (result["tf_keras_callback"] for result in results)
    check_compression_logs(first["history"], 4)
    assert first["end"] == second["end"]
    assert first["history"]["loss"] == second["history"]["loss"]
    assert math.isfinite(first["history"]["loss"][-1])


def test_the_callback_writes_a_training_log(results: Results, folder: Path) -> None:
    """Two epochs of four batches, the third of which is skipped; a line at every third batch."""
    run = read_log(folder / "fit.jsonl")
    assert [line["step"] for line in run.lines] == [2, 5, 6]
    last = run.lines[-1]
    sent = results[0]["skipped_steps"]["log"]["bytes"]
    assert [last["bytes_out"], last["bytes_in"], last["skipped"]] == [*sent, 2]
    assert run.lines[1]["layers"], "the sixth batch was good and measured"
    assert all(gradient > 0 for _, gradient in run.lines[1]["layers"].values())
    assert {"tensorflow", "keras"} <= run.header["versions"].keys()


def test_a_reducer_has_a_log_and_tensorboard(results: Results, folder: Path) -> None:
    facts, run = results[0]["skipped_steps"]["log"]["reducer"], read_log(folder / "loop.jsonl")
    (line,) = run.lines
    assert (line["step"], line["bytes_out"]) == (3, facts["bytes"])
    assert line["loss"] == pytest.approx(facts["loss"])
    assert facts["shown"]["ef/loss"] == [pytest.approx(facts["loss"])]
    assert {"ef/ratio", "ef/skipped"} <= facts["shown"].keys()
