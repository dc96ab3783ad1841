"""Sparse gradients of embeddings: as rows, or made dense; facts for the tests to judge."""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from common import report
from tf_common import digest

import ef_horovod.tensorflow as ef

ROWS, WIDTH, MATRIX = 60, 5, (40, 40)
METHOD = ef.EF21(ef.TopK(ratio=0.05))


def slices_of(rank: int, step: int, *, empty_rank: int = -1) -> tf.IndexedSlices:
    """A rank's rows: some of them twice, some of them another rank's too."""
    generator = np.random.default_rng([rank, step])
    count = 0 if rank == empty_rank else 12 + rank
    indices = generator.integers(0, 20, count)
    values = generator.standard_normal((count, WIDTH)).astype(np.float32)
    return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([ROWS, WIDTH]))


def matrix_of(rank: int, step: int) -> tf.Tensor:
    generator = np.random.default_rng([rank, step, 1])
    return tf.constant(generator.standard_normal(MATRIX).astype(np.float32))


def dense(slices: tf.IndexedSlices) -> np.ndarray:
    """What rows add up to, in float64."""
    total = np.zeros((ROWS, WIDTH))
    np.add.at(total, slices.indices.numpy(), slices.values.numpy())
    return total


def reducer_of(**options) -> ef.Reducer:
    table = tf.Variable(tf.zeros((ROWS, WIDTH)), name="table")
    matrix = tf.Variable(tf.zeros(MATRIX), name="matrix")
    reducer = ef.Reducer([table, matrix], METHOD, **options)
    reducer.kept = [table, matrix]  # it does not keep them itself
    return reducer


def rows(op=hvd.Average, empty_rank=-1):
    """Three steps of rows made by hand, some of them twice in a rank's gradient."""
    reducer, ranks = reducer_of(op=op), range(hvd.size())
    wrong, touched, once = [], [], []
    step = tf.function(reducer.reduce, reduce_retracing=True)
    for i in range(3):
        everyones = [slices_of(rank, i, empty_rank=empty_rank) for rank in ranks]
        average, _ = step([everyones[hvd.rank()], matrix_of(hvd.rank(), i)])
        expected = sum(dense(s) for s in everyones) / (hvd.size() if op == hvd.Average else 1)
        wrong.append(float(np.abs(dense(average) - expected).max()))
        indices = average.indices.numpy().tolist()
        once.append(sorted(indices) == sorted({int(k) for s in everyones for k in s.indices}))
        touched.append([len(set(s.indices.numpy().tolist())) for s in everyones])
    row = {r.name: r for r in reducer.stats()}["rows.0.table"]
    return {
        "kind": type(average).__name__,
        "once": once,
        "wrong": max(wrong),
        "largest": float(np.abs(expected).max()),
        "touched": touched,
        "bytes": [row.bytes_out, row.bytes_in, row.dense_bytes_out],
        "steps": row.steps,
    }


def summed():
    return rows(hvd.Sum)


def none_on_one_rank():
    """Rank 1 touches no row at all."""
    return rows(empty_rank=1)


def not_finite():
    """A NaN in a row on rank 1: the step is dropped on both, as if it had not been."""
    ends, dropped = [], {}
    for bad in (None, 1):
        reducer = reducer_of()
        for i in range(3):
            if i == bad:
                dropped = drop(reducer)
            last = reducer.reduce([slices_of(hvd.rank(), i), matrix_of(hvd.rank(), i)])
        ends.append(digest([last[0].values, last[0].indices, last[1]]))
    return dropped | {"ends": ends, "skipped": reducer.stats()[-1].skipped}


def drop(reducer):
    slices = slices_of(hvd.rank(), 9)
    if hvd.rank() == 1:
        slices = tf.IndexedSlices(slices.values * np.nan, slices.indices, slices.dense_shape)
    before = memories_of(reducer)
    average, matrix = reducer.reduce([slices, matrix_of(hvd.rank(), 9)])
    return {
        "all_nan": bool(np.isnan(average.values).all() and np.isnan(matrix).all()),
        "memories": memories_of(reducer) == before,
    }


def memories_of(reducer):
    state = reducer.compression_state_dict()
    fields = state["parameters"]["1.matrix"]
    return [state["step"], digest([fields[name] for name in sorted(fields)])]


def as_dense():
    """`sparse_as_dense=True` against gradients that are dense from the start."""
    ends, names = [], []
    for made_dense in (True, False):
        reducer = reducer_of(sparse_as_dense=made_dense, dense=lambda path, variable: False)
        for i in range(3):
            slices = slices_of(hvd.rank(), i)
            gradient = slices if made_dense else tf.convert_to_tensor(slices)
            averages = reducer.reduce([gradient, matrix_of(hvd.rank(), i)])
        ends.append(digest(averages))
        names.append([(row.name, row.num_elements) for row in reducer.stats()])
    sent = np.count_nonzero(averages[0])
    return {"ends": ends, "names": names, "nonzero": int(sent)}


def embedding_model():
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((6,), dtype="int32"),
        keras.layers.Embedding(200, 16),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(3),
    ]
    return keras.Sequential(layers)


def fit():
    """Keras' Adam in `model.fit`: with averaged rows as with the gradients of all data."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    generator = np.random.default_rng(0)
    words = generator.integers(0, 200, (hvd.size(), 10, 8, 6))  # rank, step, batch, word
    labels = generator.integers(0, 3, (hvd.size(), 10, 8))
    model, whole, start = embedding_model(), embedding_model(), embedding_model()
    optimizer = ef.DistributedOptimizer(keras.optimizers.Adam(0.01))
    model.compile(optimizer, loss=loss, jit_compile=False)
    mine = words[hvd.rank()].reshape(80, 6), labels[hvd.rank()].reshape(80)
    model.fit(*mine, batch_size=8, shuffle=False, verbose=0)
    adam = keras.optimizers.Adam(0.01)
    for i in range(10):
        with tf.GradientTape() as tape:
            logits = whole(words[:, i].reshape(-1, 6))
            value = loss(labels[:, i].reshape(-1), logits)
        # Dense, for Keras' Adam squares rows before it adds up those that occur twice.
        gradients = map(tf.convert_to_tensor, tape.gradient(value, whole.trainable_variables))
        adam.apply(list(gradients), whole.trainable_variables)
    return {
        "end": digest(model.trainable_variables),
        "wrong": distance(model, whole),
        "moved": distance(model, start),
        "rows": [row.name for row in optimizer.stats()],
    }


def distance(model, other):
    pairs = zip(model.trainable_variables, other.trainable_variables, strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def main() -> None:
    hvd.init()
    scenarios = (rows, summed, none_on_one_rank, not_finite, as_dense, fit)
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})
    hvd.allreduce(tf.zeros(1), name="end")  # a rank that ends early shuts Horovod down for all


main()
