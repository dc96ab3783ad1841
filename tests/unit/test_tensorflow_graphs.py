"""What the TensorFlow adapter's ops do in a graph: when they run, and in what order."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tensorflow as tf

import ef_horovod as ef
from ef_horovod.errors import OutOfSyncError, UnsupportedError
from ef_horovod.tensorflow import sync
from ef_horovod.tensorflow.buckets import _aligned
from ef_horovod.tensorflow.engine import Engine
from ef_horovod.tensorflow.graphs import WholeSteps, python_op
from ef_horovod.tensorflow.options import Options
from ef_horovod.tensorflow.variables import name_variables
from ef_horovod.testing.echo_tensorflow import EchoOps
from ef_horovod.training.policy import small_or_vector
from ef_horovod.transports.timeouts import last_words
from ef_horovod.transports.timeouts.calls import calls_under_way

SLEEP = 0.4


def engine_of(variables, method, **changes):
    options = {
        "method": method,
        "average": True,
        "dense": small_or_vector,
        "exchange": "auto",
        "bucket_bytes": 1,
        "seed": 0,
        "dense_steps": 0,
        "sparse_as_dense": False,
        "check_sync": False,
        "discardable": False,
    }
    return Engine(name_variables(variables), Options(**options | changes), EchoOps(2))


def matrices(count):
    return [tf.Variable(tf.ones((40, 40))) for _ in range(count)]


def test_no_bucket_leaves_before_the_ranks_were_compared(monkeypatch):
    """It might leave on one rank alone, which would wait for the others after their error."""
    (variable,) = matrices(1)
    engine = engine_of([variable], ef.ErrorFeedback(ef.TopK(ratio=0.1)), check_sync=True)
    events = []

    def compare(digests):
        time.sleep(SLEEP)
        events.append("compared")

    monkeypatch.setattr(sync, "_require_equal", compare)

    @tf.function
    def step():
        return engine.reduce([tf.identity(variable)], tf.constant(1.0))[0]

    step()
    channel = engine.buckets[0].channel
    start = channel.start
    monkeypatch.setattr(channel, "start", lambda step: (events.append("left"), start(step)))
    step()  # the one that compares
    step()
    assert events == ["compared", "left", "left"]


def test_a_bucket_leaves_while_backward_still_works_on_the_next():
    first, last = matrices(2)
    engine = engine_of([first, last], ef.ErrorFeedback(ef.TopK(ratio=0.1)))
    moments = {}

    @tf.custom_gradient
    def slow_backward(x):
        def backward(upstream):
            def work(value):
                time.sleep(SLEEP)
                moments["backward ended"] = time.perf_counter()
                return value

            return tf.ensure_shape(tf.numpy_function(work, [upstream], tf.float32), x.shape)

        return tf.identity(x), backward

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.matmul(slow_backward(first), last))
        gradients = tape.gradient(loss, [first, last])
        return engine.reduce(gradients, tf.constant(1.0))[0]

    step()
    bucket = engine.buckets[0]
    assert [slot.name for slot in bucket.slots] == ["1.Variable"], "the last layer's comes first"
    start = bucket.channel.start

    def noting_start(number):
        moments["bucket left"] = time.perf_counter()
        start(number)

    bucket.channel.start = noting_start
    step()
    assert moments["bucket left"] < moments["backward ended"] - SLEEP / 2


def test_buckets_do_not_wait_for_each_other():
    variables = matrices(3)
    engine = engine_of(variables, ef.EF21(ef.TopK(ratio=0.1)))
    step = tf.function(lambda *g: engine.reduce(g, tf.constant(1.0))[0])
    graph = step.get_concrete_function(*variables).graph
    sends = [op for op in graph.get_operations() if op.type == "PyFuncStateless"]
    assert len(sends) == 3
    for op in sends:
        ancestors, queue = set(), [op]
        while queue:
            here = queue.pop()
            before = [*here.control_inputs, *(tensor.op for tensor in here.inputs)]
            queue += [one for one in before if one not in ancestors]
            ancestors.update(before)
        assert not ancestors.intersection(sends)


def test_unrolled_steps_are_taken_one_after_the_other():
    """With gradients that do not depend on the variables, the step counter alone orders them."""
    variables = matrices(2)
    rng = np.random.default_rng(0)
    gradients = [[rng.normal(size=(40, 40)).astype(np.float32) for _ in range(2)] for _ in range(6)]
    method = ef.ErrorFeedback(ef.RandomK(0.1, scale="contractive"))

    def run(engine, together):
        @tf.function
        def steps(*given):
            return [engine.reduce(given[i : i + 2], tf.constant(1.0))[0] for i in together]

        flat = [g for pair in gradients for g in pair]
        if len(together) == 6:
            return [np.array(d) for pair in steps(*flat) for d in pair]
        return [np.array(d) for pair in gradients for d in steps(*pair)[0]]

    unrolled = run(engine_of(variables, method), range(0, 12, 2))
    single = run(engine_of(variables, method), [0])
    assert [a.tobytes() for a in unrolled] == [b.tobytes() for b in single]


def test_a_loop_in_the_graph_takes_its_steps_in_order():
    variables = matrices(2)
    method = ef.EF21(ef.TopK(ratio=0.1), momentum=0.3)
    stacked = np.random.default_rng(1).normal(size=(7, 40, 40)).astype(np.float32)
    looped, plain = engine_of(variables, method), engine_of(variables, method)

    @tf.function
    def loop(every):
        total = tf.zeros((40, 40))
        for i in tf.range(7):
            a, b = looped.reduce([every[i], 2 * every[i]], tf.constant(1.0))[0]
            total = total + tf.cast(i + 1, tf.float32) * (a + b)
        return total

    expected = tf.zeros((40, 40))
    for i in range(7):
        a, b = plain.reduce([stacked[i], 2 * stacked[i]], tf.constant(1.0))[0]
        expected = expected + float(i + 1) * (a + b)
    np.testing.assert_allclose(loop(tf.constant(stacked)), expected, rtol=1e-5, atol=1e-5)
    assert int(looped.step) == int(plain.step) == 7
    mine, others = looped.state_dict(), plain.state_dict()
    for name, fields in mine["parameters"].items():
        for field, value in fields.items():
            np.testing.assert_array_equal(value, others["parameters"][name][field])


def test_directions_stay_what_they_were_when_the_next_step_runs():
    """TensorFlow takes over aligned NumPy memory without a copy; it must be nobody else's."""
    variables = [tf.Variable(tf.ones((64, 64)))]
    for method in (ef.EF21(ef.Identity()), ef.NoFeedback(ef.Identity()), ef.EF21(ef.OneBit())):
        engine = engine_of(variables, method)
        step = tf.function(lambda g, engine=engine: engine.reduce([g], tf.constant(1.0))[0][0])
        kept = step(tf.ones((64, 64)))
        before = kept.numpy().copy()
        step(tf.fill((64, 64), 5.0))
        np.testing.assert_array_equal(kept, before)


def test_output_memory_is_aligned_for_tensorflow():
    for length in (1, 7, 1000):
        array = _aligned(length)
        assert array.shape == (length,)
        assert array.dtype == np.float32
        assert array.ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_gradients_come_back_in_their_own_dtype(dtype):
    variable = tf.Variable(tf.ones((40, 40), dtype))
    engine = engine_of([variable], ef.NoFeedback(ef.TopK(k=3)))
    entries = np.zeros((40, 40), np.float32)
    entries[[0, 7, 39], [1, 7, 39]] = [0.5, -3.0, 96.0]  # exact in all of them
    gradient = tf.constant(entries, dtype)
    (direction,) = tf.function(lambda g: engine.reduce([g], tf.constant(1.0))[0])(gradient)
    assert direction.dtype == dtype
    np.testing.assert_array_equal(tf.cast(direction, tf.float32), entries)


def test_a_loss_scale_does_not_reach_the_memories():
    variable = tf.Variable(tf.ones((40, 40)))
    plain, scaled = (engine_of([variable], ef.ErrorFeedback(ef.TopK(k=5))) for _ in range(2))
    gradient = tf.random.stateless_normal((40, 40), seed=[1, 2])
    for scale in (1024.0, 2.0, 0.5):
        (expected,), _ = plain.reduce([gradient], tf.constant(1.0))
        (direction,), good = scaled.reduce([gradient * scale], tf.constant(scale))
        assert good
        np.testing.assert_array_equal(direction, expected * scale)
    np.testing.assert_array_equal(
        scaled.state_dict()["parameters"]["0.Variable"]["worker.error"],
        plain.state_dict()["parameters"]["0.Variable"]["worker.error"],
    )


def test_an_error_in_a_graph_is_said_once_more_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(last_words, "remember", said.append)

    def fails(_: np.ndarray) -> np.ndarray:
        raise OutOfSyncError("got 1, expected 2; take 2")

    one = tf.constant(1.0)
    with pytest.raises(tf.errors.OpError, match="got 1, expected 2; take 2"):
        tf.function(lambda: python_op(fails, [one], tf.float32))()
    assert said == ["got 1, expected 2; take 2"]


def test_a_step_after_one_that_did_not_end_is_refused() -> None:
    steps = WholeSteps("bucket.0")
    with pytest.raises(ValueError, match="nothing was sent"), steps.beginning():
        raise ValueError("nothing was sent")
    for _ in range(2):
        with steps.beginning():
            pass
        steps.end()
    with steps.beginning():
        pass
    with (
        pytest.raises(UnsupportedError, match=r"got a step of 'bucket\.0' after one that failed"),
        steps.beginning(),
    ):
        raise AssertionError("it was let in")


def test_a_call_is_under_way_until_its_graph_has_ended_or_failed() -> None:
    asked = []

    def ask(fails: np.ndarray) -> np.ndarray:
        asked.append(calls_under_way())
        time.sleep(0.1)
        inside.append(asked[-1]())
        if fails:
            raise ValueError("elsewhere")
        return fails

    inside: list[bool] = []
    call = tf.function(lambda fails: tf.numpy_function(ask, [fails], tf.bool))
    call(tf.constant(False))
    with pytest.raises(tf.errors.OpError, match="elsewhere"):
        call(tf.constant(True))
    assert inside == [True, True]
    assert [under_way() for under_way in asked] == [False, False]


def test_a_call_that_is_not_known_counts_as_under_way() -> None:
    """An alarm must ring once too often rather than never."""
    assert calls_under_way()()
