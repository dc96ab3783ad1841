"""TensorFlow's adapter with parameter servers, without Horovod.

Arguments: a scenario, or several that are jobs of their own, one after the other; for "numbers"
also methods, one job for each, for there is one set of buckets in a job.
"""

from __future__ import annotations

import time

import keras
import numpy as np
import tensorflow as tf
from common import ARGUMENTS, error_of, report
from horovod.common.process_sets import global_process_set
from meeting import meet
from same_gradients import SEED, SHAPE, STEPS, digest, gradient
from tf_common import accuracy, build_model, data, loss_of
from tf_common import digest as digest_of

import ef_horovod.tensorflow as ef
from ef_horovod.methods.parsing import read_method

tf.config.threading.set_inter_op_parallelism_threads(2)  # `overlap` has one wait for another

EAGER_STEPS = 3  # of the trajectory; then it goes on in a tf.function
METHOD = ef.DoubleSqueeze(ef.TopK(0.05), ef.TopK(0.05))


def memories_of(optimizer):
    parameters = optimizer.compression_state_dict()["parameters"]
    return {
        f"{name} {field}": digest(value) if hasattr(value, "shape") else value
        for name, fields in parameters.items()
        for field, value in fields.items()
    }


def numbers():
    if len(ARGUMENTS) > 2:  # then so does server_again.py
        meet()
    ends = [numbers_by(method) for method in ARGUMENTS[1:]]
    return ends[0][0], {"methods": [result for _, result in ends]}


def numbers_by(method):
    """Where the steps lead, with two that are dropped and come again."""
    x = tf.Variable(tf.zeros(SHAPE))
    optimizer = ef.DistributedOptimizer(
        keras.optimizers.SGD(1.0), read_method(method), exchange="server", seed=SEED
    )
    optimizer.build([x])
    rank = optimizer.transport.rank

    def step(g):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(x * g)
        optimizer.apply(tape.gradient(loss, [x]), [x])

    in_a_function = tf.function(step)
    unchanged = []
    for i in range(STEPS):
        take = step if i < EAGER_STEPS else in_a_function
        g = gradient(rank, i)
        if i in (EAGER_STEPS - 1, STEPS - 1):
            before = memories_of(optimizer), digest(np.asarray(x)), optimizer.stats()[-1].skipped
            take(tf.constant(g * np.nan if rank == 0 else g))
            after = memories_of(optimizer), digest(np.asarray(x)), optimizer.stats()[-1].skipped
            unchanged.append(before[:2] == after[:2] and after[2] == before[2] + 1)
        take(tf.constant(g))
    total = optimizer.stats()[-1]
    optimizer.transport.close()
    begin = time.monotonic()
    closed = [error_of(lambda take=take: take(tf.constant(g))) for take in (step, in_a_function)]
    assert time.monotonic() - begin < 5, "a step of a closed worker waits"
    return rank, {
        "x": digest(np.asarray(x)),
        "unchanged": unchanged,
        "memories": len(memories_of(optimizer)),
        "exchange": optimizer.stats()[0].exchange,
        "closed": closed,
        "steps": total.steps,
        "bytes": [total.bytes_out, total.bytes_in],
    }


def fit():
    """Keras' loop; and what needs Horovod says so."""
    model = build_model()
    optimizer = ef.DistributedOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.5), METHOD, exchange="server", bucket_bytes=4
    )
    model.compile(optimizer, loss_of, jit_compile=False)
    optimizer.build(model.trainable_variables)
    rank = optimizer.transport.rank
    start = digest_of(model.trainable_variables)
    inputs, labels = data(rank, 100)
    model.fit(inputs, labels, batch_size=16, epochs=2, verbose=0)
    total, variables = optimizer.stats()[-1], model.trainable_variables
    with_callback = {"callbacks": [ef.TrainingCallback()], "verbose": 0}
    facts = {
        "start": start,
        "end": digest_of(variables),
        "accuracy": accuracy(model),
        "channels": [row.name for row in optimizer.stats()],
        "steps": total.steps,
        "ratio": total.ratio,
        "refused": [
            error_of(lambda: ef.broadcast_variables(variables)),
            error_of(lambda: ef.require_in_sync(variables)),
            error_of(lambda: model.fit(inputs, labels, **with_callback)),
            error_of(
                lambda: ef.Reducer(
                    variables, METHOD, exchange="server", process_set=global_process_set
                )
            ),
        ],
        "second": [
            error_of(lambda: ef.DistributedOptimizer(keras.optimizers.SGD(), exchange="server")),
            error_of(lambda: ef.DistributedGradientTape(tf.GradientTape(), exchange="server")),
            error_of(lambda: ef.Reducer(variables, METHOD, exchange="server")),
        ],
    }
    optimizer.transport.close()
    return rank, facts


def overlap():
    """A bucket leaves while another one's gradient is still being computed."""
    x, y = (tf.Variable(tf.zeros(SHAPE)) for _ in range(2))
    reducer = ef.Reducer([x, y], METHOD, exchange="server", bucket_bytes=4)
    engine = reducer._engine
    left = []

    def late(g):
        first = engine.buckets[0].channel  # of y, for the last variable is first
        deadline = time.monotonic() + 20
        while first._finish is None and time.monotonic() < deadline:
            time.sleep(0.01)
        left.append(first._finish is not None)
        return g

    @tf.function
    def step(g):
        of_x = tf.ensure_shape(tf.numpy_function(late, [g], tf.float32), SHAPE)
        return reducer.reduce([of_x, g])

    rank = reducer.transport.rank
    for i in range(3):
        step(tf.constant(gradient(rank, i)))
    reducer.transport.close()
    return rank, left


def silent():
    """Worker 1 stays away from step 3 on."""
    meet()
    x = tf.Variable(tf.zeros(SHAPE))
    reducer = ef.Reducer([x], METHOD, exchange="server")
    rank = reducer.transport.rank
    step = tf.function(lambda g: reducer.reduce([g])[0])
    for i in range(3):
        step(tf.constant(gradient(rank, i)))
    begin = time.monotonic()
    if rank == 1:
        time.sleep(200)
    error = error_of(lambda: step(tf.constant(gradient(rank, 3))))
    return rank, f"{time.monotonic() - begin:.1f} s: {error}"


def unequal_start():
    """Found by comparing the variables after the first step."""
    x = tf.Variable(tf.zeros(SHAPE))
    reducer = ef.Reducer([x], METHOD, exchange="server")
    rank = reducer.transport.rank
    x.assign_add(tf.fill(SHAPE, float(rank)))
    errors = [error_of(lambda: reducer.reduce([tf.ones(SHAPE)])) for _ in range(2)]
    reducer.transport.close()
    return rank, errors


def rows():
    x = tf.Variable(tf.zeros(SHAPE))
    reducer = ef.Reducer([x], METHOD, exchange="server")
    slices = tf.IndexedSlices(tf.ones((1, SHAPE[1])), [2], SHAPE)
    error = error_of(lambda: reducer.reduce([slices]))
    reducer.reduce([tf.ones(SHAPE)])  # nothing has begun by that error
    reducer.transport.close()
    return reducer.transport.rank, error


def tape():
    """Tapes of several steps share a reducer, and leave no room for another one."""
    x, y = (tf.Variable(tf.zeros(SHAPE)) for _ in range(2))

    def gradient_of(variable):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable)
        tape = ef.DistributedGradientTape(tape, METHOD, exchange="server")
        return tape.gradient(loss, [variable])[0]

    sums = [float(tf.reduce_sum(gradient_of(x))) for _ in range(2)]
    optimizer = keras.optimizers.SGD()
    second = [
        error_of(lambda: gradient_of(y)),
        error_of(lambda: ef.DistributedOptimizer(optimizer, METHOD, exchange="server")),
    ]
    (kept,) = x._ef_reducers.values()
    kept.reducer.transport.close()
    return kept.reducer.transport.rank, {"sums": sums, "second": second}


SCENARIOS = {s.__name__: s for s in (numbers, fit, overlap, silent, unequal_start, rows, tape)}


def main() -> None:
    if len(ARGUMENTS) == 1 or ARGUMENTS[0] == "numbers":
        return report(*SCENARIOS[ARGUMENTS[0]]())
    meet()
    found = {}
    for name in ARGUMENTS:
        rank, found[name] = SCENARIOS[name]()
    report(rank, found)


main()
