"""Compressors and methods through a tape in a tf.function; digests, losses.

Arguments: pairs ("selection" or "methods"), steps.
"""

from __future__ import annotations

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from common import ARGUMENTS, report
from one_of_each import chosen
from tf_common import CLASSES, INPUTS, data, digest, loss_of

import ef_horovod.tensorflow as ef


class Small(tf.Module):
    """Two layers without Keras, which would take longer to trace than to train."""

    def __init__(self):
        super().__init__()
        draw = np.random.default_rng(0).standard_normal
        self.first = tf.Variable(draw((INPUTS, 32), np.float32) / 6)
        self.bias = tf.Variable(tf.zeros(32))
        self.second = tf.Variable(draw((32, CLASSES), np.float32) / 6)

    def loss(self, inputs, labels):
        return loss_of(labels, tf.tanh(inputs @ self.first + self.bias) @ self.second)

    def loss_of_test(self):
        return float(self.loss(*data(999, 50)))


def train(method, steps):
    model = Small()
    variables = [model.first, model.bias, model.second]
    start, loss_at_start = digest(variables), model.loss_of_test()
    lr, dense_steps = (0.003, 5) if method.makes_updates else (0.1, 0)
    reducer = ef.Reducer(variables, method, dense_steps=dense_steps)

    @tf.function
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = model.loss(inputs, labels)
        tape = ef.DistributedGradientTape(tape, compression=reducer)
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(lr * gradient)

    inputs, labels = (part.reshape(steps, 16, *part.shape[1:]) for part in data(hvd.rank(), steps))
    for i in range(steps):
        step(tf.constant(inputs[i]), tf.constant(labels[i]))
    (compressed,) = (row for row in reducer.stats() if row.name == "bucket.0")
    return {
        "start": start,
        "end": digest(variables),
        "loss at start": loss_at_start,
        "loss": model.loss_of_test(),
        "bytes": compressed.bytes_out,
        "dense bytes": compressed.dense_bytes_out,
        "steps": compressed.steps,
        "traces": step.experimental_get_tracing_count(),
    }


def main() -> None:
    hvd.init()
    results = {}
    for method in chosen(ARGUMENTS[0]):
        results[repr(method)] = train(method, int(ARGUMENTS[1]))
    report(hvd.rank(), results)


main()
