"""Accumulation, clipping, loss scaling, checkpoints and the like, as training loops use them."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import Results, horovod_job

from ef_horovod.training.log_file import read_log

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return horovod_job(2, "features.py", folder)


def test_two_half_batches_are_one_batch(results: Results) -> None:
    assert results[0]["accumulation"] < 1e-6


def test_a_backward_pass_too_many_raises(results: Results) -> None:
    for result in results:
        backward, step = result["too_many_passes"]
        assert "raise backward_passes_per_step" in backward
        assert "was changed between backward() and step()" in step


def test_clipping_sees_the_average(results: Results) -> None:
    first, second = (result["clipping"] for result in results)
    assert first["norms"] == second["norms"]
    assert min(first["norms"]) > 0.011, "nothing was clipped"
    assert first["clipped"] == pytest.approx(0.01, rel=1e-3)
    assert "call synchronize() first" in first["unsynchronized"]


def test_memories_are_free_of_the_loss_scale(results: Results) -> None:
    for result in results:
        scaling = result["loss_scaling"]
        assert scaling["difference"] == 0.0  # scales are powers of two
        assert len(set(scaling["scales"])) == 3, "the scale did not change"
        assert scaling["skipped"] == 1, "the overflow on rank 1 was not noticed on both"


def test_a_resumed_run_ends_as_an_uninterrupted_one(results: Results) -> None:
    for result in results:
        assert result["checkpoint"]["whole"] == result["checkpoint"]["again"]
        assert "expected 'ErrorFeedback(OneBit(" in result["checkpoint"]["method"]
        assert "of rank 99, expected" in result["checkpoint"]["rank"]


def test_a_layer_that_one_rank_uses_is_averaged(results: Results) -> None:
    assert results[0]["unused_parameters"]["end"] == results[1]["unused_parameters"]["end"]
    for result in results:
        assert "'3.weight' requires a gradient now" in result["unused_parameters"]["unfrozen"]


def test_sparse_gradients_are_densified(results: Results) -> None:
    sparse = results[0]["sparse_gradients"]
    assert sparse["difference"] < 1e-5 < sparse["moved"]
    assert sparse["end"] == results[1]["sparse_gradients"]["end"]


def test_state_restored_on_one_rank_is_broadcast(results: Results) -> None:
    first, second = (result["restored_on_one_rank"] for result in results)
    assert first["is_sgd"]
    assert first["end"] == second["end"]


def test_ranks_may_run_the_hooks_of_two_stock_optimizers_in_any_order(results: Results) -> None:
    first, second = (result["hooks_in_another_order"] for result in results)
    assert first == second
    assert first[0] != first[1]


def test_the_hook_of_a_dropped_step_is_removed(results: Results) -> None:
    for result in results:
        assert result["hooks_of_dropped_steps"] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("what", "way_out"),
    [
        ("adasum", "use hvd.DistributedOptimizer"),
        ("groups", "set bucket_bytes"),
        ("predivide", "leave it out"),
        ("compressor", "wrap it: ErrorFeedback(TopK"),
        ("horovod's", "NoFeedback(Cast('float16'))"),
        ("twice", "wrap it once"),
        ("unnamed", "pass model.named_parameters()"),
        ("reduce", "use exchange='gather' or 'auto'"),
        ("new group", "before wrapping"),
        ("lbfgs", "use SGD or Adam"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(
    what: str, way_out: str, results: Results
) -> None:
    for result in results:
        assert way_out in result["refused"][what]


def test_statistics_say_what_was_sent(results: Results) -> None:
    facts = results[0]["statistics"]
    assert facts["names"] == ["bucket.0", "dense.0", "total"]
    payload, elements = facts["payload"], facts["elements"]
    assert facts["bytes"] == [4 * payload, 4 * payload, 4 * 4 * elements]  # 4 steps, 2 ranks
    assert 0 < facts["error"] < 1
    assert all(seconds > 0 for seconds in facts["seconds"])
    assert facts["lr"] == 0.025, "the scheduler did not reach the wrapped optimizer"


def test_a_log_has_the_bytes_of_both_parts_of_a_training(results: Results, folder: Path) -> None:
    facts, run = results[0]["training_log"], read_log(folder / "log.jsonl")
    assert [line["step"] for line in run.lines] == [2, 4, 5, 7, 8]
    first, second = facts["sent"]
    assert [run.lines[2][name] for name in ("bytes_out", "bytes_in")] == first
    assert [run.lines[4][name] for name in ("bytes_out", "bytes_in")] == [
        a + b for a, b in zip(first, second, strict=True)
    ]
    assert (run.header["start"], run.header["ranks"]) == (5, 2)
    assert {"torch", "horovod"} <= run.header["versions"].keys()
    assert facts["losses"] == [1.5] * 5


def test_a_log_has_the_error_of_each_parameter(results: Results, folder: Path) -> None:
    """Line 7 was measured before its step; those that `close` wrote, 5 and 8, were not."""
    facts, run = results[0]["training_log"], read_log(folder / "log.jsonl")
    assert set(run.lines[3]["layers"]) == set(facts["names"])
    assert run.lines[4]["layers"] == {}
    for name, (error, gradient) in run.lines[3]["layers"].items():
        assert gradient > 0, name
        assert (error > 0) == (facts["errors"].get(name, 0) > 0), name


def test_with_the_stock_optimizer_each_rank_may_write_a_log(results: Results, folder: Path) -> None:
    for rank, result in enumerate(results):
        run = read_log(folder / f"stock{rank}.jsonl")
        assert (run.header["rank"], run.lines[-1]["step"]) == (rank, 3)
        assert run.lines[-1]["bytes_out"] == result["training_log"]["stock"]
        assert all(gradient > 0 for _, gradient in run.lines[-1]["layers"].values())
