"""A step that is left out never happened, and loss scales are never in a step."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "steps_left_out.py", tmp_path_factory.mktemp("steps_left_out"))


def test_a_step_that_is_left_out_leaves_no_trace(results: Results) -> None:
    for result in results:
        for method, runs in result["steps_left_out"].items():
            for way, run in runs.items():
                assert run["end"] == runs["without"]["end"], f"{method}, {way}"
                assert run["steps"] == 12
                # Under way in the first step nothing was sent, so nothing is counted as skipped.
                assert (run["skipped"] >= 5) == (way != "without"), f"{method}, {way}"


def test_averages_that_are_kept_are_part_of_the_next_gradient(results: Results) -> None:
    for result in results:
        assert result["averages_in_the_next_gradient"] < 1e-6


@pytest.mark.parametrize(
    "way",
    ["by_hand", "by_hand_in_the_old_way", "by_hand_and_the_model", "by_the_optimizer_inside"],
)
def test_averages_that_are_applied_without_step_are_not_left_out(
    way: str, results: Results
) -> None:
    for result in results:
        assert result["averages_applied"][way] < 1e-6


def test_averages_that_are_changed_and_neither_used_nor_left_out_raise(results: Results) -> None:
    for result in results:
        assert (
            "expected step(), or zero_grad() or discard()"
            in result["averages_changed_and_forgotten"]
        )


def test_a_discriminator_that_a_generator_reaches_is_left_out(results: Results) -> None:
    for result in results:
        found = result["generator_and_discriminator"]
        assert "torch.autograd.grad" in found["refused"]
        assert "discard()" in found["refused"]
        assert found["end"] == results[0]["generator_and_discriminator"]["end"]


@pytest.mark.parametrize(
    "recipe",
    [
        "no argument",
        "unscale_",
        "grad_scaler",
        "fused",
        "fused, unscale_",
        "fewer passes, unscale_",
    ],
)
def test_the_usual_scaler_recipe_is_as_without_a_scaler(recipe: str, results: Results) -> None:
    for result in results:
        found = result["usual_recipe"][recipe]
        assert found["difference"] == 0.0  # scales are powers of two
        assert len(set(found["scales"])) == 3, "the scale did not change"
        assert found["scales"] == results[0]["usual_recipe"][recipe]["scales"]
        assert found["skipped"] == 1, "the overflow on rank 1 was not noticed on both"


@pytest.mark.parametrize(
    ("slip", "sentence"),
    [
        ("direct step", "write scaler.step(optimizer)"),
        ("unscale_, direct step", "was changed between backward() and step()"),
        ("not passed, synchronize", "pass grad_scaler=scaler"),
        ("a late scaler", "pass it as grad_scaler="),
    ],
)
def test_scaled_gradients_are_refused(slip: str, sentence: str, results: Results) -> None:
    for result in results:
        assert sentence in result["slips_with_a_scaler"][slip]


def test_a_gradient_that_is_clipped_under_way_is_refused_with_a_scaler_too(
    results: Results,
) -> None:
    for result in results:
        assert len(result["clipped_with_a_scaler"]) == 8
        for error in result["clipped_with_a_scaler"]:
            assert "was changed between backward() and step()" in error
            assert "pass grad_scaler=scaler" in error


def test_horovods_recipe_works_where_nothing_is_remembered(results: Results) -> None:
    for result in results:
        assert 0 < result["slips_with_a_scaler"]["Identity moved by"] < 0.1


@pytest.mark.parametrize(
    ("slip", "sentence"),
    [
        ("left out", "take ef.DistributedOptimizer, whose zero_grad() and discard()"),
        ("clipped too early", "was changed between backward() and step()"),
        ("unscaled too early", "was changed between backward() and step()"),
    ],
)
def test_the_stock_adapter_refuses(slip: str, sentence: str, results: Results) -> None:
    for result in results:
        assert sentence in result["stock_adapter"][slip]


def test_the_stock_adapter_leaves_out_what_is_not_remembered(results: Results) -> None:
    for result in results:
        assert result["stock_adapter"]["left out, no memory"] == ""


def test_the_stock_adapters_memories_are_free_of_the_loss_scale(results: Results) -> None:
    for result in results:
        assert result["stock_scaler"] == 0.0  # scales are powers of two
