"""What people do by mistake is noticed, and what looks like one but is not works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Results, horovod_job
from processes import JobFailed

import ef_horovod as ef

METHOD = repr(ef.ErrorFeedback(ef.OneBit()))

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "mistakes.py", tmp_path_factory.mktemp("mistakes"))


def test_join_is_refused_beside_a_wrapped_optimizer(results: Results) -> None:
    for result in results:
        facts = result["joining"]
        for what in ("optimizer", "adapter"):
            assert facts[what].startswith("UnsupportedError: got hvd.join() while gradients are")
        assert facts["last"] in (0, 1)


def test_a_join_that_was_imported_before_ends_all_ranks(tmp_path: Path) -> None:
    """By itself; Horovod's shutdown would take for ever."""
    with pytest.raises(JobFailed, match="Horovod's shutdown did not return in 2 s") as failure:
        horovod_job(2, "joins.py", tmp_path, timeout=100)
    assert "did not end within" not in str(failure.value)
    error = json.loads((tmp_path / "rank1.json").read_text())["error"]
    assert error.startswith("CollectiveTimeoutError: rank 1 of 2 waited 3 s in ")
    assert "or called hvd.join(), which cannot go with compression" in error


def test_clipping_what_is_under_way_raises(results: Results) -> None:
    for result in results:
        assert "was changed between backward() and step()" in result["clipping_too_early"]


def test_a_frozen_parameter_is_noticed_and_wrapping_again_works(results: Results) -> None:
    for result in results:
        facts = result["freezing_and_wrapping_again"]
        assert "'0.weight' requires no gradient now" in facts["refused"]
        assert "call unwrap() on the other one first" in facts["taken"]
        assert facts["still"], "a frozen parameter moved"
        assert facts["end"] == results[0]["freezing_and_wrapping_again"]["end"]


def test_tied_and_complex_parameters_are_refused(results: Results) -> None:
    errors = results[0]["strange_parameters"]
    for adapter in ("", ", stock"):
        assert "list tied parameters once" in errors[f"tied{adapter}"]
        assert "real numbers (torch.view_as_real" in errors[f"complex{adapter}"]


@pytest.mark.parametrize(
    ("slip", "sentence"),
    [
        ("parameters", "got something of type Parameter in named_parameters, expected pairs"),
        ("one parameter", "in named_parameters, expected pairs"),
        ("not called", "got something of type method in named_parameters, expected pairs"),
        ("method second", f"got {METHOD} in named_parameters, expected pairs"),
        ("model first", "got Linear as optimizer, expected a torch optimizer"),
        ("state dict", "expected a name for each"),
        ("adapter, swapped", "expected a method"),
        ("adapter, parameters", "got something of type Parameter in named_parameters, expected"),
        ("adapter, alone", "got something of type NoneType in named_parameters, expected pairs"),
        ("stock, method", f"got {METHOD} as compression= of stock Horovod, expected ef.Compr"),
        ("stock, compressor", "as compression= of stock Horovod, expected ef.Compression"),
        ("estimator, swapped", "EstimatedGradient got SGD as estimator, expected one such"),
        ("estimator, loss", "backward() got Tensor, expected a function"),
    ],
)
def test_slips_raise_a_sentence(slip: str, sentence: str, results: Results) -> None:
    for result in results:
        assert sentence in result["slips"][slip]


@pytest.mark.parametrize("form", ["dict", "model", "adapter, model"])
def test_parameters_are_taken_in_other_forms(form: str, results: Results) -> None:
    assert all(result["slips"][form] == "" for result in results)


def test_synchronizing_twice_changes_nothing(results: Results) -> None:
    assert all(result["synchronizing_twice"] for result in results)


def test_an_accumulation_can_be_given_up(results: Results) -> None:
    for result in results:
        facts = result["an_epoch_that_ends_within_an_accumulation"]
        assert facts["steps"] == 1
        assert "expected the change after step()" in facts["late"]


def test_step_hooks_and_schedulers_survive_a_load(results: Results) -> None:
    for result in results:
        assert result["loading_a_state"] == {"calls": 2, "lr": 0.05}


def test_a_closure_is_evaluated_once_a_step(results: Results) -> None:
    first, second = (result["closure"] for result in results)
    assert first["last"] < 0.2 * first["first"]
    assert first["end"] == second["end"]


def test_one_loss_may_go_through_two_optimizers(results: Results) -> None:
    assert results[0]["two_optimizers"] == results[1]["two_optimizers"]


def test_the_stock_adapter_resumes_to_the_last_bit(results: Results) -> None:
    for result in results:
        assert result["stock_checkpoint"]["whole"] == result["stock_checkpoint"]["again"]


def test_what_needs_fixed_ranks_is_refused_in_elastic_jobs(results: Results) -> None:
    found = results[0]["elastic"]
    for error in (*found["refused"], *found["fixed"]):
        assert "horovodrun -np N" in error
    for error, got in zip(
        found["fixed"], ("'hierarchical'", "'auto:1gbit'", "a process_set"), strict=True
    ):
        assert got in error
    assert "expected one without weights" in found["weights"]


@pytest.mark.parametrize("gloo", [False, True], ids=["mpi", "gloo"])
def test_a_rank_that_leaves_is_noticed_by_name(gloo: bool, tmp_path: Path) -> None:
    said = horovod_job(2, "ends_early.py", tmp_path, gloo=gloo)[0]
    where = dict(waits="second", allgather="third", alltoall="fourth", allreduce="fifth")
    for name, collective in where.items():
        expected = f"HorovodInternalError: rank 0 of 2 failed in 'ef.{collective}': "
        assert said[name].startswith(expected)
        assert "a rank ended early" in said[name]
