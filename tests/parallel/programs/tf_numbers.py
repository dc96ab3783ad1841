"""What the TensorFlow reducer computes, beside the same in NumPy; gradients come from seeds."""

from __future__ import annotations

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from common import report
from tf_common import build_model, data, loss_of

import ef_horovod.tensorflow as ef
from ef_horovod.arrays.keys import Key, tensor_id

STEPS, SEED = 6, 5
SHAPES = ((40, 60), (7,), (50, 30))  # two that are compressed, as one vector, and a dense one
METHODS = (
    ef.EF21(ef.TopK(ratio=0.1)),
    ef.EF21(ef.TopK(ratio=0.1), momentum=0.3),
    ef.ErrorFeedback(ef.OneBit()),
    ef.ErrorFeedback(ef.RandomK(0.2, shared=False)),
    ef.NoFeedback(ef.Cast("float16")),
)


def gradients_of(rank, step):
    generator = np.random.default_rng((rank, step))
    return [generator.standard_normal(shape, np.float32) for shape in SHAPES]


def reduced(reducer, in_graph):
    """This rank's gradients of all steps through the reducer."""

    def reduce(*gradients):
        return reducer.reduce(gradients)

    reduce = tf.function(reduce) if in_graph else reduce
    return [
        [direction.numpy() for direction in reduce(*map(tf.constant, gradients_of(RANK, step)))]
        for step in range(STEPS)
    ]


def by_halves(method):
    """Directions of the compressed vector, from the method's own halves for all ranks."""
    vectors = [
        [bucket_of(gradients_of(rank, step)) for rank in range(SIZE)] for step in range(STEPS)
    ]
    inits = [method.init(vectors[0][0], SIZE) for _ in range(SIZE)]
    states, server = [worker for worker, _ in inits], inits[0][1]
    directions = []
    for step, of_ranks in enumerate(vectors):
        keys = [Key(SEED, step, tensor_id("bucket.0"), rank, SIZE) for rank in range(SIZE)]
        pushed = [
            method.push(state, vector, key)
            for state, vector, key in zip(states, of_ranks, keys, strict=True)
        ]
        aggregate, server = method.reduce(
            server, [message for message, _ in pushed], keys[0].of_server()
        )
        pulled = [method.pull(state, aggregate) for _, state in pushed]
        states = [state for _, state in pulled]
        directions.append(pulled[RANK][0].copy())
    return directions


def bucket_of(parts):
    """As a bucket packs them: last variable first."""
    first, _, last = parts
    return np.concatenate([last.reshape(-1), first.reshape(-1)])


def variables():
    return [tf.Variable(tf.zeros(shape)) for shape in SHAPES]


def methods_as_in_numpy():
    """Steps whose directions have the bits that NumPy computes; the gradients differ by rank."""
    same = {}
    for method in METHODS:
        expected = by_halves(method)
        for in_graph in (True, False):
            results = reduced(ef.Reducer(variables(), method, seed=SEED), in_graph)
            same[f"{method!r}{' in a graph' * in_graph}"] = sum(
                bool(np.array_equal(bucket_of(result), direction))
                for result, direction in zip(results, expected, strict=True)
            )
    return same


def averages():
    """Without compression: distance of averages, or sums, to those of NumPy."""
    identity = ef.NoFeedback(ef.Identity())
    everyones = [[gradients_of(rank, step) for rank in range(SIZE)] for step in range(STEPS)]
    sums = [[np.sum(parts, 0) for parts in zip(*ranks, strict=True)] for ranks in everyones]
    distances = {}
    for exchange in ("auto", "gather", "reduce"):
        for op, divisor in ((hvd.Average, SIZE), (hvd.Sum, 1)):
            reducer = ef.Reducer(variables(), identity, exchange=exchange, op=op)
            distances[f"{exchange} {op == hvd.Sum}"] = max(
                float(np.abs(got - total / divisor).max())
                for result, step in zip(reduced(reducer, True), sums, strict=True)
                for got, total in zip(result, step, strict=True)
            )
    return distances


def gradients_of_a_model():
    """What tapes give against the mean of the gradients that every rank's batch has alone."""
    model = build_model()
    trained = model.trainable_variables

    def gradients(rank, wrap, sources):
        inputs, labels = data(rank, 1)
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(inputs))
        return [g.numpy() for g in wrap(tape).gradient(loss, sources)]

    alone = [gradients(rank, lambda tape: tape, trained) for rank in range(SIZE)]
    means = [np.mean(parts, 0) for parts in zip(*alone, strict=True)]
    identity = ef.NoFeedback(ef.Identity())
    stock = ef.Compression(identity, trained)
    averaged = {
        "ef": gradients(
            RANK, lambda tape: ef.DistributedGradientTape(tape, compression=identity), trained
        ),
        "stock": gradients(
            RANK,
            lambda tape: hvd.DistributedGradientTape(tape, compression=stock),
            [variable.value for variable in trained],
        ),
        "alone": alone[RANK],  # is far from the mean, or this shows nothing
    }
    return {
        name: max(float(np.abs(a - b).max()) for a, b in zip(parts, means, strict=True))
        for name, parts in averaged.items()
    }


hvd.init()
RANK, SIZE = hvd.rank(), hvd.size()
scenarios = (methods_as_in_numpy, averages, gradients_of_a_model)
report(RANK, {scenario.__name__: scenario() for scenario in scenarios})
