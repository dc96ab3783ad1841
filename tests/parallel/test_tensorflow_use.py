"""TensorFlow as people use it: a script works as with plain Horovod, or a sentence refuses it."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel

FAMILIES = ["keras", "tf_keras"]
# Of models that Keras 3 has by default, too; programs/tf_use_keras.py leaves the same ones out.
KERAS_FIRST = ["keras", pytest.param("tf_keras", marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, every_case: bool) -> Results:
    which = "all" if every_case else "sample"
    return horovod_job(2, "tf_use.py", tmp_path_factory.mktemp("tf_use"), which, timeout=400)


def test_a_policy_made_at_each_step_keeps_the_memories(results: Results) -> None:
    for result in results:
        found = result["policies_made_at_each_step"]
        assert found["tape"] == found["reducer"]
        assert found["kept"] == 1, "each step leaves a reducer behind"


def test_variables_in_another_order_have_the_same_memories(results: Results) -> None:
    for result in results:
        for mine, expected in result["another_order"]:
            assert mine == expected


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("method", "compression=ErrorFeedback(TopK(ratio=0.06))", "TopK(ratio=0.05)"),
        ("option", "seed=1", "had 0"),
        ("decisions", "dense=(None, None)", "had (ErrorFeedback(TopK(ratio=0.05))"),
    ],
)
def test_a_tape_with_another_meaning_is_refused(
    what: str, first: str, second: str, results: Results
) -> None:
    for result in results:
        error = result["other_meanings"][what]
        assert error.startswith(f"UnsupportedError: got a tape with {first}")
        assert second in error
        assert "make method and options once" in error


def test_equal_methods_and_other_sets_of_variables_are_no_other_meaning(results: Results) -> None:
    for result in results:
        errors = result["other_meanings"]
        assert [errors[what] for what in ("equal method", "subset", "other variables")] == [""] * 3
        assert "list tied parameters once" in errors["twice"]


def test_a_gradient_that_a_rank_lacks_counts_as_zeros(results: Results) -> None:
    for result in results:
        assert result["missing_gradients"] == {
            "one each": [[1.0, 1.0]],
            "never": [[2.0, None], [2.0, None]],
            "from some step on": [[2.0, 2.0], [2.0, 1.0], [2.0, 0.0]],
            "in a graph": [[1.0, 1.0]],
            "rows": [[1.0], [1.0], [2.0]],
            "rows here, dense there": [[2.0], [2.0]],
            "rows, then dense": [[2.0], [2.0]],
        }


@pytest.mark.parametrize("what", ["reducer", "accumulation"])
def test_a_gradient_that_appears_late_is_named(what: str, results: Results) -> None:
    for result in results:
        error = result["gradients_that_appear"][what]
        assert error.startswith("UnsupportedError: got a gradient of 'late:0', which had none")
        assert "unconnected_gradients=tf.UnconnectedGradients.ZERO" in error


def test_a_pass_without_a_gradient_adds_zeros(results: Results) -> None:
    for result in results:
        assert result["gradients_that_appear"]["missing pass"] == ""
        assert result["gradients_that_appear"]["sum"] == -1.0


def test_each_set_of_an_optimizers_variables_has_memories(results: Results) -> None:
    first, second = (result["sets_of_variables"] for result in results)
    assert first["mine"] == second["mine"] == first["expected"]
    assert first["sets"] == ["0_1_2", "1_2"]  # beside those of the first call
    assert first["rows"] == 4
    assert "'late:0', expected variables that the optimizer was built for" in first["not built for"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_broadcast_does_not_go_by_keras_names(family: str, results: Results) -> None:
    first, root = (result["broadcasts"]["names"][family] for result in results)
    assert first["before"] != root["before"]
    assert first["after"] == root["after"] == root["before"]


def test_values_of_each_dtype_are_broadcast(results: Results) -> None:
    for result in results:
        assert result["broadcasts"]["kinds"] == [3.0] * 7 + [1.0, 0.0]


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("shape", "variable number 0 'Variable' of shape (2, 3)", "of shape (3, 2)"),
        ("dtype", "of shape (2,) and float32", "of shape (2,) and int32"),
        ("number", "nothing there", "variable number 2 'Variable'"),
        ("none", "nothing there", "variable number 0 'Variable'"),
        ("name", "variable number 0 'a'", "variable number 0 'b'"),
        ("root", "root_rank=0", "root_rank=1"),
    ],
)
def test_ranks_with_other_variables_are_told_before_a_broadcast(
    what: str, first: str, second: str, results: Results
) -> None:
    for result in results:
        error = result["broadcasts"][what]
        assert error.startswith("ConfigMismatchError: rank 0 has ")
        here, found, there = error.partition("rank 1 has ")
        assert found, error
        assert first in here
        assert second in there


def test_a_root_that_is_no_rank_is_refused(results: Results) -> None:
    for result in results:
        assert (
            "got root_rank=2, expected a rank from 0 to 1" in result["broadcasts"]["no such root"]
        )


@pytest.mark.parametrize("exchange", ["gather", "double_pass"])
def test_memories_of_values_that_are_gone_start_anew(exchange: str, results: Results) -> None:
    """And those of values that were equal before the broadcast stay."""
    for result in results:
        found = result["memories_after_a_broadcast"]
        mine, fresh = found[f"other, {exchange}"]
        assert mine == fresh
        mine, fresh = found[f"equal, {exchange}"]
        assert mine != fresh


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model", ["unbuilt", "eager", "gan"])
def test_keras_models_train_with_equal_parameters(
    family: str, model: str, results: Results
) -> None:
    require_equal(family, model, results)


@pytest.mark.parametrize("family", KERAS_FIRST)
@pytest.mark.parametrize("model", ["subclassed", "distillation", "gan, one optimizer"])
def test_other_keras_models_train_with_equal_parameters(
    family: str, model: str, results: Results
) -> None:
    require_equal(family, model, results)


def require_equal(family: str, model: str, results: Results) -> None:
    first, second = (result["keras_models"][family][model] for result in results)
    assert (first["error"], second["error"]) == ("", "")
    assert first["end"] == second["end"]


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("keras", "unbuilt"),
        ("keras", "subclassed"),
        ("tf_keras", "unbuilt"),
        pytest.param("tf_keras", "subclassed", marks=pytest.mark.exhaustive),
    ],
)
def test_a_model_built_by_its_first_batch_trains_as_one_built_before(
    family: str, model: str, results: Results
) -> None:
    """To the last bit: so the first step was taken at the root's values, on all ranks."""
    for result in results:
        models = result["keras_models"][family]
        assert models[model]["end"] == models[f"{model}, built before"]["end"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_eager_first_batch_leaves_nothing_in_memories(family: str, results: Results) -> None:
    for result in results:
        found = result["keras_models"][family]["eager"]
        assert found["first"] == [0.0]
        assert found["last"][0] > 0


@pytest.mark.parametrize("family", KERAS_FIRST)
def test_a_teacher_that_is_not_trained_does_not_move(family: str, results: Results) -> None:
    (before, after), (_, other) = (
        result["keras_models"][family]["distillation"]["teacher"] for result in results
    )
    assert before == after == other  # rank 0's


@pytest.mark.parametrize("family", KERAS_FIRST)
def test_one_optimizer_for_both_halves_of_a_gan_does_as_two(family: str, results: Results) -> None:
    for result in results:
        models = result["keras_models"][family]
        assert models["gan, one optimizer"]["end"] == models["gan"]["end"]


def test_a_step_that_failed_elsewhere_is_no_wait(results: Results) -> None:
    """Before, its limit shut Horovod down long after the error was caught."""
    for result in results:
        found = result["a_step_that_fails_elsewhere"]
        first, second = found["errors"]
        assert "this is the data's fault" in first
        assert found["alive"] == 1.0
        assert "UnsupportedError: got a step of 'bucket." in second
        assert "restart from a checkpoint" in second


def test_a_discarded_step_leaves_no_trace(results: Results) -> None:
    for result in results:
        found = result["discarded_steps"]
        assert len(found["averages"]) == 6
        for averages in found["averages"].values():
            assert all(mine == expected for mine, expected in averages)
        assert found["steps"][0] == found["steps"][1]


@pytest.mark.parametrize(
    ("what", "way_out"),
    [
        ("not discardable", "pass discardable=True to ef.Reducer()"),
        ("traced", "decide outside of it"),
        ("optimizer", "see ef.Reducer.discard"),
    ],
)
def test_what_cannot_be_discarded_is_refused(what: str, way_out: str, results: Results) -> None:
    for result in results:
        assert way_out in result["discarded_steps"][what]
        assert "expected" in result["discarded_steps"][what]


def test_float64_and_nothing_to_compress_are_said_on_rank_0(results: Results) -> None:
    first, second = (result["surprises"] for result in results)
    assert second == []
    double, reducer, stock = first
    assert "got float64 in 1 of 1 parameters (such as 'double:0')" in double
    for one, elements in ((reducer, 16), (stock, 20)):
        assert "got no parameter to compress" in one
        assert f"the largest of {elements} elements" in one
