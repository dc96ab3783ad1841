"""TensorFlow: what cannot work is refused with the way out, and a rank that is missing is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import Results, horovod_job
from processes import JobFailed

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "tf_guards.py", tmp_path_factory.mktemp("tf_guards"))


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("compressor", "ratio=0.01", "ratio=0.02"),
        ("compressor, eager", "ratio=0.01", "ratio=0.02"),
        ("compressor, stock", "ratio=0.01", "ratio=0.02"),
        ("compressor, fit", "ratio=0.01", "ratio=0.02"),
        ("compressor, tf_keras", "ratio=0.01", "ratio=0.02"),
        ("shape", "(40, 60)", "(40, 61)"),
        ("number of variables", "nothing there", "'2.kernel'"),
        ("seed", "seed=0", "seed=1"),
        ("op", "average=True", "average=False"),
        ("exchange", "exchange='reduce'", "exchange='gather'"),
        ("buckets", "in bucket.0", "in bucket.1"),
    ],
)
def test_ranks_that_disagree_are_told_on_every_rank(
    what: str, first: str, second: str, results: Results
) -> None:
    for result in results:
        error, seconds = result["disagreements"][what]
        _, found, sentence = error.partition("ConfigMismatchError: rank 0 has ")
        here, also_found, there = sentence.partition("rank 1 has")
        assert found, error
        assert also_found, error
        assert first in here
        assert second in there
        assert seconds < 60, "it came with the limit of a wait"


@pytest.mark.parametrize(
    ("what", "way_out"),
    [
        ("jit, function", "pass jit_compile=False"),
        ("jit, stock", "pass jit_compile=False"),
        ("jit, fit", "pass jit_compile=False"),
        ("jit, tf_keras", "pass jit_compile=False"),
        ("adasum", "use hvd.DistributedGradientTape without compression"),
        ("adasum, optimizer", "use hvd.DistributedGradientTape without compression"),
        ("compressor", "wrap it: ErrorFeedback(TopK"),
        ("compressor, reducer", "wrap it: ErrorFeedback(OneBit"),
        ("compressor, stock", "wrap it: ErrorFeedback(OneBit"),
        ("compressor, tape", "wrap it: ErrorFeedback(OneBit"),
        ("horovod's", "NoFeedback(Cast('float16'))"),
        ("passes", "expected a whole number of at least 1"),
        ("passes twice", "leave one out"),
        ("none", "pass model.trainable_variables"),
        ("model", "pass its .trainable_variables"),
        ("model, stock", "pass its .trainable_variables"),
        ("model, broadcast", "pass its .trainable_variables"),
        ("model, in sync", "pass its .trainable_variables"),
        ("model, tape", "take gradients of tensors from the plain tape"),
        ("one variable", "pass a list of them, such as model.trainable_variables"),
        ("names", "pass a list of them, such as model.trainable_variables"),
        ("changed places", "expected a method"),
        ("changed places, reducer", "expected a method"),
        ("twice", "list tied parameters once"),
        ("complex", "real and imaginary parts as real numbers"),
        ("reducer's", "give them to ef.Reducer()"),
        ("ours twice", "wrap it once"),
        ("ours twice, tf_keras", "wrap it once"),
        ("stock's again", "wrap it once"),
        ("legacy", "or ef.DistributedGradientTape"),
        ("no optimizer", "expected one of keras.optimizers"),
        ("state too early", "call optimizer.build("),
        ("other variables", "wrap an optimizer for each set of variables"),
        ("fewer gradients", "with None where there is none"),
        ("another order", "pass gradients in the order of the variables"),
        ("integers", "of a floating type"),
        ("tensor", "take gradients of tensors from the plain tape"),
        ("missing, stock", "or take ef.DistributedGradientTape, which sends rows and zeros"),
        ("rows, stock", "or take ef.DistributedGradientTape, which sends rows and zeros"),
        ("another shape", "or take ef.DistributedGradientTape"),
        ("replicas", "start one process for each"),
        ("scaler by keras", "write ef.DistributedOptimizer(keras.optimizers.LossScaleOptimizer("),
        ("scaler outside", "write ef.DistributedOptimizer(keras.optimizers.LossScaleOptimizer("),
        ("scaler, accumulation", "write ef.DistributedOptimizer(tf_keras.mixed_precision."),
        ("join", "or call unwrap() first"),
        ("elastic", "start it with horovodrun -np N"),
        ("elastic, stock", "start it with horovodrun -np N"),
        ("elastic, optimizer", "start it with horovodrun -np N"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(
    what: str, way_out: str, results: Results
) -> None:
    for result in results:
        error = result["refused"][what]
        assert way_out in error
        assert "expected" in error, "it does not say what was expected"


def test_what_was_refused_leaves_nothing_behind(results: Results) -> None:
    assert [result["good"] for result in results] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("where", "collective"),
    [
        ("function", "ef0.bucket.0"),
        # Eager steps wait in test_tensorflow_double_pass.py.
        pytest.param("eager", "ef0.bucket.0", marks=pytest.mark.exhaustive),
        pytest.param("first step", "ef0.", marks=pytest.mark.exhaustive),
        pytest.param("stock", "ef.stock0.0.Variable", marks=pytest.mark.exhaustive),
    ],
)
def test_a_rank_that_does_not_come_ends_the_job(
    where: str, collective: str, tmp_path: Path
) -> None:
    """It sleeps for 100 s; rank 0 waits for 8 s, says so and ends, and mpirun ends the other."""
    with pytest.raises(JobFailed) as failure:
        horovod_job(
            2, "tf_missing_rank.py", tmp_path, where, timeout=95,
            environment={"EF_HOROVOD_TIMEOUT": "8"},  # other waits are shorter, also under load
        )  # fmt: skip
    output = re.sub(r"\[1,\d\]<std(out|err)>: ?", "", str(failure.value))
    assert "did not end within" not in output
    said = f"ef_horovod: rank 0 of 2 waited 8 s in '{collective}"
    assert said in output
    assert "see why it did not get there" in output
    assert output.rfind(said) > output.rfind("Traceback"), "the reason is not the last that is said"
    seconds = [float(s) for s in re.findall(r"step \d took ([\d.]+) s", output)]
    assert 8 <= max(seconds[-2:]) < 25
