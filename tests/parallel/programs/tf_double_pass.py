"""The double pass in TensorFlow: eager, in graphs, by Keras and by Horovod's tape."""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from common import OUT, error_of, report
from tf_common import build_model, data, digest, loss_of

import ef_horovod.tensorflow as ef
from ef_horovod import simulate

STEPS, SIZE, SHAPE = 12, 16, (64, 128)
TOP, SIGNS = ef.TopK(ratio=0.1), ef.OneBit()
METHODS = (
    ef.DoubleSqueeze(TOP, server_compressor=SIGNS),
    ef.EF21(SIGNS, server_compressor=SIGNS),
    ef.EF21(TOP, momentum=0.5),
    ef.DoubleSqueeze(ef.HardThreshold(0.01), server_compressor=ef.HardThreshold(0.01)),
)
OPTIONS = {"exchange": "double_pass", "seed": 3}


def batches(bad_at=None):
    """STEPS batches; before one of them perhaps a bad one, on the last rank."""
    inputs, labels = data(hvd.rank(), STEPS, SIZE)
    pairs = list(zip(inputs.reshape(STEPS, SIZE, -1), labels.reshape(STEPS, SIZE), strict=True))
    if bad_at is not None:
        spoilt = pairs[0][0].copy()
        spoilt[3, 5] = np.nan if hvd.rank() == hvd.size() - 1 else 0
        pairs.insert(bad_at, (spoilt, pairs[0][1]))
    return pairs


class Loop:
    """A loop of one's own over several buckets; in a graph, or eagerly."""

    def __init__(self, method, *, graph=True, stock=False, seed=0):
        self.model, self.plain = build_model(seed), keras.optimizers.SGD(0.05, momentum=0.5)
        self.variables = self.model.trainable_variables
        self.plain.build(self.variables)
        if stock:
            self.source = ef.Compression(method, self.variables, **OPTIONS)
        else:
            self.source = ef.Reducer(self.variables, method, bucket_bytes=8000, **OPTIONS)
        self.stock = stock
        self.run = tf.function(self.step) if graph else self.step

    def step(self, inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, self.model(inputs))
        if self.stock:
            tape = hvd.DistributedGradientTape(tape, compression=self.source)
            gradients = tape.gradient(loss, [v.value for v in self.variables])
            good = tf.constant(True)
        else:
            gradients = tape.gradient(loss, self.variables)
            gradients, good = self.source.reduce_scaled(gradients, 1.0)
        tf.cond(good, lambda: self.apply(gradients), lambda: tf.constant(0))

    def apply(self, gradients):
        self.plain.apply(gradients, self.variables)
        return tf.constant(0)

    def train(self, pairs):
        for inputs, labels in pairs:
            self.run(tf.constant(inputs), tf.constant(labels))
        return digest(self.variables)


def trainings():
    """Where loops end: in a graph, eagerly, and by the stock tape."""
    ends = {}
    for method in METHODS:
        for graph in (True, False):  # which round a model's own numbers in other places
            ends[f"{method} {graph}"] = Loop(method, graph=graph).train(batches())
    for graph in (True, False):
        ends[f"stock {graph}"] = Loop(METHODS[0], graph=graph, stock=True).train(batches())
    return ends


def start():
    return digest(build_model().trainable_variables)


def as_in_one_process():
    """A matrix's steps, in a graph and eagerly, against the simulation; and their bytes."""
    facts = {}
    for method in METHODS:
        run = simulate(
            method, lambda rank, x, step: gradient(rank, step), np.zeros(SHAPE, np.float32),
            workers=hvd.size(), steps=5, step_size=1.0, seed=3, name="bucket.0",
            exchange="double_pass",
        )  # fmt: skip
        for wrap in (tf.function, lambda function: function):
            x = tf.Variable(tf.zeros(SHAPE))
            reducer = ef.Reducer([x], method, **OPTIONS)
            reduce = wrap(lambda g, reducer=reducer: reducer.reduce([g])[0])
            for step in range(5):
                x.assign_sub(reduce(tf.constant(gradient(hvd.rank(), step))))
            facts[f"{method} {wrap is tf.function}"] = {
                "same": x.numpy().tobytes() == run.x.tobytes(),
                "sent": reducer.stats()[0].bytes_out,
                "simulated": run.bytes_sent,
            }
    return facts


def gradient(rank, step):
    return np.random.default_rng((rank, step)).standard_normal(SHAPE, np.float32)


def not_finite():
    """A NaN on the last rank: all end as if its batch had not been."""
    facts = {}
    for graph in (True, False):
        loops = [Loop(METHODS[0], graph=graph) for _ in range(2)]
        ends = [loop.train(batches(bad)) for loop, bad in zip(loops, (None, 4), strict=True)]
        memories = [memories_of(loop.source.compression_state_dict()) for loop in loops]
        facts[f"graph {graph}"] = {
            "same": ends[0] == ends[1] and memories[0] == memories[1],
            "skipped": loops[1].source.stats()[-1].skipped,
        }
    return facts


def memories_of(state):
    parts = [value for fields in state["parameters"].values() for value in fields.values()]
    return digest([*parts, state["step"]])


def resumed():
    """Half of the steps, and the rest in new objects: the bits of all steps."""
    half = STEPS // 2
    whole, again = Loop(METHODS[2]), Loop(METHODS[2], seed=5)
    whole.train(batches()[:half])
    folder = str(OUT / f"saved{hvd.rank()}")
    parts = {"model": whole.model, "plain": whole.plain, "reducer": whole.source}
    path = tf.train.Checkpoint(**parts).save(folder)
    parts = {"model": again.model, "plain": again.plain, "reducer": again.source}
    tf.train.Checkpoint(**parts).restore(path)
    return [loop.train(batches()[half:]) for loop in (whole, again)]


def by_keras():
    """model.fit, whose optimizer is wrapped, with rows of an embedding beside the buckets."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Embedding(50, 16), keras.layers.Flatten(),
            keras.layers.Dense(64, activation="tanh"), keras.layers.Dense(10),
        ]
    )  # fmt: skip
    rng = np.random.default_rng(hvd.rank())
    words = rng.integers(0, 50, (STEPS * SIZE, 20))
    model.build((None, 20))
    start = digest(model.trainable_variables)
    optimizer = ef.DistributedOptimizer(keras.optimizers.SGD(0.1), METHODS[0], **OPTIONS)
    model.compile(optimizer, loss=loss_of, jit_compile=False)
    model.fit(words, words[:, 0] % 10, batch_size=SIZE, verbose=0, shuffle=False)
    rows = {row.name: row.exchange for row in optimizer.stats()}
    return {"start": start, "end": digest(model.trainable_variables), "rows": rows}


def refused():
    return error_of(lambda: ef.Reducer(build_model().variables, ef.PowerSGD(rank=2), **OPTIONS))


def main() -> None:
    hvd.init()
    scenarios = (start, trainings, as_in_one_process, not_finite, resumed, by_keras, refused)
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
