"""TensorFlow as people use it: tapes made anew, gradients that are missing, models of all kinds.

Argument: "all", or "sample" for fewer models of tf_keras.
"""

from __future__ import annotations

import time
import warnings

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
import tf_keras
from common import error_of, report
from tf_common import digest
from tf_use_keras import FAMILIES, METHOD, keras_models

import ef_horovod.tensorflow as ef

EXACT = ef.EF21(ef.TopK(ratio=1.0))


def matrices(count=2, **names):
    return [tf.Variable(tf.zeros((40, 50)), **names) for _ in range(count)]


def gradient_of(step, place=0):
    rng = np.random.default_rng(100 * step + 10 * place + hvd.rank())
    return tf.constant(rng.standard_normal((40, 50), dtype=np.float32))


def taped(variables, step, method=METHOD, **options):
    """The averages of one eager step, with a tape that is made for it."""
    with tf.GradientTape() as tape:
        loss = sum(tf.reduce_sum(v * gradient_of(step, i)) for i, v in enumerate(variables))
    return ef.DistributedGradientTape(tape, method, **options).gradient(loss, variables)


def sha(tensors):
    return digest([t.numpy() for t in tensors])


# Tapes that are made at each step.


def policies_made_at_each_step():
    """The function is another one in each step, what it decides is not."""
    ours, theirs = matrices(), matrices()
    reducer = ef.Reducer(theirs, METHOD, dense=lambda *_: False)
    mine = [sha(taped(ours, step, dense=lambda *_: False)) for step in range(4)]
    expected = [sha(reducer.reduce([gradient_of(step, i) for i in range(2)])) for step in range(4)]
    kept = [one for v in ours for one in v.__dict__.get("_ef_reducers", {}).values()]
    return {"tape": mine, "reducer": expected, "kept": len(kept)}


def another_order():
    """The same variables, in turn from the front and from the back: the same memories."""
    ours, theirs = matrices(), matrices()
    reducer = ef.Reducer(theirs, METHOD)
    steps = []
    for step in range(4):
        order = [1, 0] if step % 2 else [0, 1]
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(v * gradient_of(step, i)) for i, v in enumerate(ours))
        averages = ef.DistributedGradientTape(tape, METHOD).gradient(loss, [ours[i] for i in order])
        expected = reducer.reduce([gradient_of(step, i) for i in range(2)])
        steps.append([sha(averages), sha([expected[i] for i in order])])
    return steps


def other_meanings():
    """What would start with empty memories in the middle of a training."""
    variables = matrices()
    taped(variables, 0)
    apart = tf.Variable(variables[0])
    return {
        "method": error_of(lambda: taped(variables, 1, ef.ErrorFeedback(ef.TopK(ratio=0.06)))),
        "equal method": error_of(
            lambda: taped(variables, 1, ef.ErrorFeedback(ef.TopK(ratio=0.05)), seed=0)
        ),
        "option": error_of(lambda: taped(variables, 1, seed=1)),
        "decisions": error_of(lambda: taped(variables, 1, dense=lambda *_: True)),
        "subset": error_of(lambda: taped(variables[:1], 1)),
        "other variables": error_of(lambda: taped([apart], 1, seed=1)),
        "twice": error_of(lambda: taped([apart, apart], 1)),
    }


# Gradients that are missing.


def values(gradients):
    """Each gradient's only number, or None."""
    dense = [None if g is None else tf.convert_to_tensor(g).numpy() for g in gradients]
    return [None if g is None else float(np.unique(g).item()) for g in dense]


def missing_gradients():
    """Twos where a rank has a gradient: averages are 1 with one such rank, 2 with both."""
    odd, twos = hvd.rank() == 1, tf.fill((40, 50), 2.0)
    rows = tf.IndexedSlices(twos, tf.range(40), (40, 50))
    mine, other = (twos, None) if odd else (None, twos)

    def averages(*steps, count=2):
        reducer = ef.Reducer(matrices(count), EXACT)
        return [values(reducer.reduce(gradients)) for gradients in steps]

    def in_a_graph(*steps):
        reducer = ef.Reducer(matrices(), EXACT)
        return [values(tf.function(lambda g=g: reducer.reduce(g))()) for g in steps]

    return {
        "one each": averages([mine, other]),
        "never": averages([twos, None]) + in_a_graph([twos, None]),
        "from some step on": averages([twos, twos], [twos, other], [twos, None]),
        "in a graph": in_a_graph([mine, other]),
        "rows": averages([rows if odd else None], [None if odd else rows], [rows], count=1),
        "rows here, dense there": averages([rows if odd else twos], [twos], count=1),
        "rows, then dense": averages([rows], [twos], count=1),
    }


def gradients_that_appear():
    reducer = ef.Reducer(matrices(name="late"), EXACT)
    ones = tf.ones((40, 50))
    reducer.reduce([ones, None])
    variables = matrices(name="late")
    optimizer = ef.DistributedOptimizer(
        keras.optimizers.SGD(1.0), EXACT, backward_passes_per_step=2
    )
    optimizer.build(variables)
    optimizer.apply([ones, None], variables)
    return {
        "reducer": error_of(lambda: reducer.reduce([ones, ones])),
        "accumulation": error_of(lambda: optimizer.apply([ones, ones], variables)),
        "missing pass": error_of(lambda: optimizer.apply([None, None], variables)),
        "sum": float(np.unique(variables[0].numpy()).item()),
    }


def sets_of_variables():
    """One optimizer, called with parts of its variables in turn: each has memories of its own."""
    variables, alone = matrices(3), matrices(3)
    optimizer = ef.DistributedOptimizer(keras.optimizers.SGD(1.0), METHOD)
    optimizer.build(variables)
    parts = [[0], [1, 2], [0, 1, 2]]
    singles = [ef.DistributedOptimizer(keras.optimizers.SGD(1.0), METHOD) for _ in parts]
    for step in range(6):
        part, single = parts[step % 3], singles[step % 3]
        gradients = [gradient_of(step, i) for i in part]
        optimizer.apply(gradients[::-1], [variables[i] for i in part][::-1])
        single.apply(gradients, [alone[i] for i in part])
    (late,) = matrices(1, name="late")
    state = optimizer.compression_state_dict()
    optimizer.load_compression_state_dict(state)
    return {
        "mine": [digest([v]) for v in variables],
        "expected": [digest([v]) for v in alone],
        "rows": len(optimizer.stats()),
        "sets": sorted(state["others"]),
        "not built for": error_of(lambda: optimizer.apply([gradient_of(0)], [late])),
    }


# Broadcasts.


def broadcasts():
    odd = hvd.rank() == 1

    def other(first, second):
        return error_of(lambda: ef.broadcast_variables([tf.Variable(second if odd else first)]))

    if not odd:
        tf_keras.Sequential([tf_keras.layers.Dense(3)]).build((None, 4))
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    names = {}
    for family, package in FAMILIES.items():
        model = package.Sequential([package.layers.Dense(9), package.layers.Dense(8)])
        model.build((None, 4))
        optimizer = package.optimizers.Adam()
        optimizer.build(model.trainable_variables)
        everything = [*model.variables, *optimizer.variables]
        before = digest(everything)
        ef.broadcast_variables(everything, 1)
        names[family] = {"before": before, "after": digest(everything)}
    number = hvd.rank()
    values = [
        tf.fill((3,), tf.cast(number, dtype))
        for dtype in (tf.float32, tf.bfloat16, tf.float16, tf.float64, tf.int64, tf.uint8, tf.bool)
    ]
    kinds = [tf.Variable(value) for value in (*values, number, tf.zeros((0, 3)))]
    ef.broadcast_variables(kinds, 1)
    return {
        "names": names,
        "kinds": [float(np.sum(v.numpy().astype(float))) for v in kinds],
        "shape": other(tf.zeros((2, 3)), tf.zeros((3, 2))),
        "dtype": other(tf.zeros(2), tf.zeros(2, tf.int32)),
        "number": error_of(lambda: ef.broadcast_variables(matrices(2 + odd))),
        "none": error_of(lambda: ef.broadcast_variables(matrices(int(odd)))),
        "name": error_of(lambda: ef.broadcast_variables(matrices(name=("a", "b")[odd]))),
        "root": error_of(lambda: ef.broadcast_variables(matrices(), hvd.rank())),
        "no such root": error_of(lambda: ef.broadcast_variables(matrices(), 2)),
    }


def memories_after_a_broadcast():
    """Of values that differed nothing may be left; of equal ones everything."""
    found = {}
    for what, differ in (("equal", False), ("other", True)):
        for exchange in ("gather", "double_pass"):
            variables, fresh = matrices(1), matrices(1)
            variables[0].assign(tf.fill((40, 50), float(differ * hvd.rank())))
            method = METHOD if exchange == "gather" else ef.DoubleSqueeze(ef.OneBit(), ef.OneBit())
            reducer, new = (
                ef.Reducer(v, method, exchange=exchange, check_sync=False)
                for v in (variables, fresh)
            )
            reducer.reduce([gradient_of(0)])
            ef.broadcast_variables(variables)
            found[f"{what}, {exchange}"] = [
                sha(one.reduce([gradient_of(1)])) for one in (reducer, new)
            ]
    return found


def discarded_steps():
    """A step that nobody applies, in turn with others, against a training that never had it."""
    found = {}
    ways = (
        ("gather", METHOD),
        ("gather", ef.EF21(ef.TopK(ratio=0.05))),
        ("double_pass", ef.DoubleSqueeze(ef.OneBit(), ef.OneBit())),
    )
    for exchange, method in ways:
        options = {"exchange": exchange, "check_sync": False}
        with_spikes = ef.Reducer(matrices(), method, discardable=True, **options)
        without = ef.Reducer(matrices(), method, **options)
        wraps = {"eager": lambda f: f, "graph": tf.function}
        for how, wrap in wraps.items():
            ours, theirs = wrap(with_spikes.reduce), wrap(without.reduce)
            averages = []
            for step in range(4):
                gradients = [gradient_of(step, i) for i in range(2)]
                ours([1000 * g for g in gradients])
                with_spikes.discard()
                with_spikes.discard()  # once more does nothing
                averages.append([sha(ours(gradients)), sha(theirs(gradients))])
            ours([g * np.nan for g in gradients])
            with_spikes.discard()  # of a step that was dropped: nothing either
            averages.append([sha(ours(gradients)), sha(theirs(gradients))])
            found[f"{how}, {method!r}"] = averages
    counts = [with_spikes.stats()[-1].steps, without.stats()[-1].steps]

    @tf.function
    def traced():
        with_spikes.reduce(gradients)
        with_spikes.discard()

    return {
        "averages": found,
        "steps": counts,
        "not discardable": error_of(without.discard),
        "traced": error_of(traced),
        "optimizer": error_of(
            lambda: ef.DistributedOptimizer(keras.optimizers.SGD(), METHOD, discardable=True)
        ),
    }


def surprises():
    """float64, and nothing to compress: said once, on rank 0."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ef.Reducer([tf.Variable(tf.zeros((40, 40), tf.float64), name="double")], METHOD)
        ef.Reducer([tf.Variable(tf.zeros((4, 4)))], METHOD)
        ef.Compression(METHOD, [tf.Variable(tf.zeros((4, 5)))])
        ef.Reducer(matrices(), METHOD)
    return [str(warning.message) for warning in caught]


def a_step_that_fails_elsewhere():
    """Between a push and its end; the limit passes, Horovod still works, the next step is told."""
    variables = matrices()
    reducer = ef.Reducer(variables, EXACT, bucket_bytes=1, timeout=6)
    reducer.reduce([gradient_of(0), gradient_of(0)])

    def fail(gradient):
        time.sleep(2)  # the other bucket is on its way
        raise ValueError("this is the data's fault")

    @tf.function
    def step(fails):
        first = gradient_of(1)
        if fails:
            first = tf.ensure_shape(tf.numpy_function(fail, [first], tf.float32), (40, 50))
        return reducer.reduce([first, gradient_of(1)])

    errors = [error_of(lambda: step(True))]
    time.sleep(8)
    alive = float(hvd.allreduce(tf.ones(1), name="alive").numpy().item())
    errors.append(error_of(lambda: step(False)))
    return {"errors": errors, "alive": alive}


def main() -> None:
    hvd.init()
    scenarios = (
        policies_made_at_each_step, another_order, other_meanings, missing_gradients,
        gradients_that_appear, sets_of_variables, broadcasts, memories_after_a_broadcast,
        discarded_steps, surprises, keras_models, a_step_that_fails_elsewhere,
    )  # fmt: skip
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
