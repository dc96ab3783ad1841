"""Accumulation, Keras' own options and missing gradients, as TensorFlow users have them."""

from __future__ import annotations

from typing import Any

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel

OPTIONS = [
    "plain", "clipnorm", "global_clipnorm", "clipvalue", "weight_decay", "use_ema", "schedule",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "tf_features.py", tmp_path_factory.mktemp("features"))


def accumulated(results: Results, how: str) -> dict[str, Any]:
    """What one rank says, when both have ended alike."""
    first, second = (result["accumulation"][how] for result in results)
    assert first["end"] == second["end"]
    return first


@pytest.mark.parametrize("how", ["keras", "keras_eager", "keras_fit", "passes_mean"])
def test_four_micro_batches_are_one_step_with_their_mean(how: str, results: Results) -> None:
    facts, mean = (accumulated(results, name) for name in (how, "by_hand_mean"))
    assert facts["values"] == pytest.approx(mean["values"], abs=1e-6)
    large = accumulated(results, "one_batch")
    assert facts["values"] == pytest.approx(large["values"], abs=1e-6)


def test_four_passes_are_one_step_with_their_sum(results: Results) -> None:
    facts, total = (accumulated(results, name) for name in ("passes_sum", "by_hand_sum"))
    assert facts["values"] == pytest.approx(total["values"], abs=1e-6)
    mean = accumulated(results, "by_hand_mean")
    assert facts["values"] != pytest.approx(mean["values"], abs=1e-4), "a mean was applied"


def test_accumulation_adds_up_the_same_bits_as_by_hand_and_in_fit(results: Results) -> None:
    ends = {name: accumulated(results, name)["end"] for name in results[0]["accumulation"]}
    assert ends["keras_eager"] == ends["by_hand_mean"]
    assert ends["keras"] == ends["keras_fit"] == ends["passes_mean"]


def test_micro_batches_are_sent_and_counted_once_a_step(results: Results) -> None:
    once = accumulated(results, "one_batch")
    assert once["steps"] == [3, 0, 3]
    for how in ("keras", "keras_eager", "keras_fit", "passes_mean", "passes_sum"):
        facts = accumulated(results, how)
        assert (facts["steps"], facts["bytes"]) == (once["steps"], once["bytes"])


def test_the_config_still_has_keras_accumulation_and_not_ours(results: Results) -> None:
    configs = {name: facts["config"] for name, facts in results[0]["accumulation"].items()
               if "config" in facts}  # fmt: skip
    assert configs["keras"] == configs["keras_fit"] == configs["scaled"] == 4
    assert configs["passes_mean"] is configs["passes_sum"] is None


def test_a_nan_in_one_micro_batch_drops_that_step_alone(results: Results) -> None:
    facts, without = (accumulated(results, h) for h in ("not_finite", "without_that_update"))
    assert facts["end"] == without["end"]
    assert facts["steps"] == [2, 1, 2]


def test_a_loss_scaler_outside_of_accumulation_halves_its_scale_once(results: Results) -> None:
    facts, without = (accumulated(results, h) for h in ("scaled", "without_that_update"))
    assert facts["end"] == without["end"], "the scale has changed a bit"
    assert facts["scale"] == 512


@pytest.mark.parametrize("option", OPTIONS)
def test_keras_options_act_on_averages_as_in_plain_keras(option: str, results: Results) -> None:
    for result in results:
        facts = result["on_averages"][option]
        assert facts["distributed"] == facts["reference"]
        assert facts["distributed"] == results[0]["on_averages"][option]["distributed"]


def test_each_of_these_options_does_something(results: Results) -> None:
    ends = results[0]["on_averages"]
    assert list(ends) == OPTIONS
    assert len({facts["distributed"] for facts in ends.values()}) == len(OPTIONS)


def test_a_variable_without_a_gradient_stays_without_one(results: Results) -> None:
    for result in results:
        assert result["missing"]["reducer"]["none"] == [False, True, False]
        assert result["missing"]["optimizer"]["changed"] == [True, False, True]
        assert result["missing"]["optimizer"]["end"] == results[0]["missing"]["optimizer"]["end"]


@pytest.mark.parametrize("change", ["missing", "sparse"])
def test_a_gradient_may_be_missing_or_sparse_later(change: str, results: Results) -> None:
    for result in results:
        assert result["changed_later"][change] == ["", ""]


def test_a_gradient_that_was_missing_at_first_raises(results: Results) -> None:
    for result in results:
        for error in result["changed_later"]["back"]:
            assert "UnsupportedError: got a gradient of 'second:0', which had none at the" in error
            assert "make a reducer, tape or optimizer for each set" in error
