"""MomentumCorrection and FrozenAdam in TensorFlow, on one rank or more."""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
import tf_keras
from common import error_of, report
from tf_common import build_model, data, loss_of

import ef_horovod.tensorflow as ef

TOP = ef.MomentumCorrection(ef.TopK(ratio=0.05))
DENSE = ef.NoFeedback(ef.Identity())


ADAM = ef.FrozenAdam(ef.OneBit(), eps=1e-12)  # Keras adds it elsewhere


def fit(optimizer, method, **options):
    """All parameters after 20 steps, as one vector."""
    model = build_model()
    optimizer = ef.DistributedOptimizer(optimizer, method, **options)
    model.compile(optimizer, loss=loss_of, jit_compile=False)
    model.fit(*data(hvd.rank(), 20), batch_size=16, verbose=0, shuffle=False)
    return np.concatenate([np.asarray(v).ravel() for v in model.trainable_variables])


def without_compression():
    """Largest differences from Keras' SGD with momentum, and how far its parameters went."""
    facts = {}
    start = np.concatenate([np.asarray(v).ravel() for v in build_model().trainable_variables])
    for nesterov in (False, True):
        expected = fit(keras.optimizers.SGD(0.05, momentum=0.9, nesterov=nesterov), DENSE)
        method = ef.MomentumCorrection(ef.Identity(), nesterov=nesterov)
        found = fit(keras.optimizers.SGD(0.05), method)
        off, moved = np.abs(found - expected).max(), np.abs(expected - start).max()
        facts[f"nesterov={nesterov}"] = {"off": float(off), "moved": float(moved)}
    return facts


def adam():
    """Dense steps only, and with compression after them, against Keras' AdamW."""
    start = np.concatenate([np.asarray(v).ravel() for v in build_model().trainable_variables])
    expected = fit(keras.optimizers.AdamW(0.003, weight_decay=0.1, epsilon=1e-12), DENSE)
    facts = {"moved": float(np.abs(expected - start).max())}
    for dense_steps in (20, 12):
        sgd = keras.optimizers.SGD(0.003, weight_decay=0.1)
        found = fit(sgd, ADAM, dense_steps=dense_steps)
        facts[f"off, {dense_steps}"] = float(np.abs(found - expected).max())
    return facts


def of_adam():
    """What is refused beside FrozenAdam."""

    def wrap(optimizer, dense_steps=2):
        return error_of(lambda: ef.DistributedOptimizer(optimizer, ADAM, dense_steps=dense_steps))

    return {
        "AdamW": wrap(keras.optimizers.AdamW()),
        "momentum": wrap(keras.optimizers.SGD(0.1, momentum=0.5)),
        "clipping": wrap(keras.optimizers.SGD(0.1, global_clipnorm=1.0)),
        "broadcast": broadcast_later(),
        "dense steps": error_of(lambda: fit(keras.optimizers.SGD(0.1), ADAM)),
    }


def broadcast_later():
    """New values of a variable after the first step."""
    variable = tf.Variable(tf.ones((40, 40)))
    reducer = ef.Reducer([variable], ADAM, dense_steps=2)
    reducer.reduce([tf.ones((40, 40))])
    variable.assign_add(tf.fill((40, 40), float(hvd.rank())))
    return error_of(lambda: ef.broadcast_variables([variable], root_rank=0))


def embedding():
    table = tf.Variable(tf.ones((100, 50)))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.gather(table, [1, 2, 3]))
    gradients = [tape.gradient(loss, table)]
    rows = error_of(lambda: ef.Reducer([table], TOP).reduce(gradients))
    dense = ef.Reducer([table], TOP, sparse_as_dense=True)
    return rows, error_of(lambda: dense.reduce(gradients))


def refusals():
    def wrap(optimizer):
        return error_of(lambda: ef.DistributedOptimizer(optimizer, TOP))

    momentum, adam = keras.optimizers.SGD(0.1, momentum=0.5), keras.optimizers.Adam()
    rows, dense = embedding()
    variables = build_model().trainable_variables
    return {
        "momentum": wrap(momentum),
        "loss scale": wrap(keras.optimizers.LossScaleOptimizer(momentum)),
        "beta_1": wrap(adam),
        "tf_keras": wrap(tf_keras.optimizers.SGD(0.1, momentum=0.5)),
        "plain": wrap(keras.optimizers.SGD(0.1)) + wrap(keras.optimizers.RMSprop()),
        "sparse": rows,
        "sparse as dense": dense,
        "stock": error_of(lambda: ef.Compression(TOP, variables)),
    }


def main() -> None:
    hvd.init()
    scenarios = (without_compression, adam, of_adam, refusals)
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
