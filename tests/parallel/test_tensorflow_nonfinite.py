"""A NaN or an infinity on one rank, with and without loss scaling: all ranks leave the step out."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, every_case: bool) -> Results:
    which = "all" if every_case else "sample"
    return horovod_job(2, "tf_nonfinite.py", tmp_path_factory.mktemp("nonfinite"), which)


@pytest.mark.parametrize(
    ("optimizer", "bad"),
    [
        ("sgd", "inf"),
        ("adam", "nan"),
        pytest.param("sgd", "nan", marks=pytest.mark.exhaustive),
        pytest.param("adam", "inf", marks=pytest.mark.exhaustive),
    ],
)
def test_a_step_with_it_changes_nothing_on_any_rank(
    optimizer: str, bad: str, results: Results
) -> None:
    for result in results:
        without, with_it = (result["keras_loop"][f"{optimizer} {what}"] for what in ("None", bad))
        assert with_it["unchanged"]
        assert not without["unchanged"], "an ordinary step changes nothing: the test sees nothing"
        assert with_it["ends"] == without["ends"]


@pytest.mark.parametrize("fit", ["keras_fit", "tf_keras_fit"])
def test_model_fit_goes_on_as_if_the_batch_had_not_been(fit: str, results: Results) -> None:
    for result in results:
        without, with_it = result[fit]
        assert with_it == without
        assert without[2] == 6, "iterations"
    first, second = (result[fit][0] for result in results)
    assert first[0] == second[0], "parameters"
    assert first[1] != second[1], "memories are each rank's own"


def test_a_tape_returns_nan_on_all_ranks_and_keeps_its_memories(results: Results) -> None:
    for result in results:
        assert result["tape"] == {"all_nan": True, "unchanged": True}


def test_in_horovod_s_tape_one_variable_keeps_its_memory(results: Results) -> None:
    for result in results:
        facts = result["stock"]
        assert facts["kept"] == [True, False]
        assert facts["nan"] == [True, False]
        assert facts["skipped"] == [1, 0, 1]
        assert facts["next_finite"]


@pytest.mark.parametrize("how", ["constant", "dynamic", "overflow"])
def test_a_loss_scale_changes_no_bit_of_parameters_and_memories(how: str, results: Results) -> None:
    for result in results:
        runs = result["loss_scaling"]
        assert runs[how]["ends"] == runs["none"]["ends"]


def test_an_overflow_on_one_rank_halves_the_scale_on_all(results: Results) -> None:
    for result in results:
        runs = result["loss_scaling"]
        assert runs["dynamic"]["scales"] == [1024, 1024, 2048, 2048, 2048, 4096]
        assert runs["overflow"]["scales"] == [1024, 1024, 512, 512, 512, 1024, 1024]


def test_mixed_float16_keeps_ranks_equal_and_memories_in_gradient_units(results: Results) -> None:
    for result in results:
        small, large = (result["mixed_float16"][scale] for scale in ("small", "large"))
        assert small["scales"] == [64, 64, 32, 32, 32, 32, 32]
        assert large["scales"] == [4096, 4096, 2048, 2048, 2048, 2048, 2048]
        for scale, run in (("small", small), ("large", large)):
            assert run["ends"][0] == results[0]["mixed_float16"][scale]["ends"][0]
            assert run["ends"][2] == 6
            assert 0 < run["error"] < 0.01, "memories are not those of float32 training"


@pytest.mark.parametrize(
    ("policy", "dtype"), [("mixed_bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_bfloat16_keeps_ranks_equal(policy: str, dtype: str, results: Results) -> None:
    for result in results:
        run = result["half_precision"][policy]
        assert run["dtype"] == dtype
        assert run["unchanged"]
        assert run["ends"][0] == results[0]["half_precision"][policy]["ends"][0]
        assert run["ends"][2] == 6


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_tf_keras_loss_scalers_halve_their_scale_on_all_ranks(where: str, results: Results) -> None:
    for result in results:
        without, with_it = (result["tf_keras_scalers"][f"{where} {bad}"] for bad in ("None", "nan"))
        assert (without["scale"], with_it["scale"]) == (2.0**15, 2.0**14)
        assert (without["skipped"], with_it["skipped"]) == (0, 1)
        assert with_it["end"][:2] == without["end"][:2]
        assert with_it["end"][0] == results[0]["tf_keras_scalers"][f"{where} nan"]["end"][0]
        # tf_keras' scaler counts steps that it leaves out.
        assert (without["end"][2], with_it["end"][2]) == (6, 7)
