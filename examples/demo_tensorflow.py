"""Train a small convolutional network over Horovod with and without error feedback, and compare.

    horovodrun -np 2 python examples/demo_tensorflow.py

`launch/demo --framework tensorflow` makes the environment and runs this. It is demo_torch.py with
Keras 3: same images, same batches, same step sizes, the same network up to its random start.
"""

from __future__ import annotations

from typing import Any

import demo_training
import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from demo_data import Images
from demo_methods import CountingCompression, Row, Sent, sent_by
from demo_training import MOMENTUM, WEIGHT_DECAY, Framework

import ef_horovod.tensorflow as ef

# Keras takes weight decay past the momentum, which multiplies PyTorch's by this much.
DECAY_OUTSIDE_MOMENTUM = WEIGHT_DECAY / (1 - MOMENTUM)


def small_cnn(height: int, channels: int) -> keras.Model:
    """Two convolutions and two dense layers, about 150,000 parameters."""
    layers = keras.layers
    halved = height // 2 if height > 16 else height
    return keras.Sequential(
        [
            keras.Input((height, height, channels)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(height // halved),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(halved // 4),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


class KerasTraining:
    """A network that is trained by one method; see `demo_training.Training`."""

    def __init__(self, row: Row, seed: int, train: Images, test: Images) -> None:
        keras.utils.set_random_seed(seed)
        self._x, self._y = tf.constant(channels_last(train.x)), tf.constant(train.y)
        self._test = test
        self._model = model = small_cnn(*self._x.shape[2:])
        self.parameters = model.count_params()
        self._compression: Any = None  # for Horovod's tape; Horovod's own optimizer lacks Keras 3
        self._steps = 0
        optimizer = keras.optimizers.SGD(
            0.0, momentum=MOMENTUM, weight_decay=DECAY_OUTSIDE_MOMENTUM
        )
        if row.method is None:
            stock = getattr(hvd.Compression, row.stock)
            self._compression = CountingCompression(stock, hvd.size(), lambda t: t.dtype.size)
        elif row.adapter:
            self._compression = ef.Compression(row.method, model.trainable_variables)
        else:
            wrap = ef.CompressedUpdates if row.updates else ef.DistributedOptimizer
            optimizer = wrap(optimizer, compression=row.method)
        optimizer.build(model.trainable_variables)
        ef.broadcast_variables(model.variables + optimizer.variables)
        self._optimizer, self._compiled = optimizer, tf.function(self._step)

    def set_step_size(self, size: float) -> None:
        self._optimizer.learning_rate = size

    def step(self, batch: np.ndarray) -> float:
        self._steps += 1
        return float(self._compiled(tf.constant(batch)))

    def sent(self) -> Sent:
        if not isinstance(self._compression, CountingCompression):
            return sent_by((self._compression or self._optimizer).stats())
        traced = self._compression.sent  # it runs once, when the graph of a step is made
        return Sent(self._steps * traced.everything, self._steps * traced.compressed)

    def accuracy(self) -> float:
        parts = np.split(channels_last(self._test.x), range(500, len(self._test.x), 500))
        predicted = np.concatenate([np.argmax(self._model(part), axis=1) for part in parts])
        return float(np.mean(predicted == self._test.y))

    def _step(self, batch: tf.Tensor) -> tf.Tensor:
        images, labels = tf.gather(self._x, batch), tf.gather(self._y, batch)
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            logits = self._model(images, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        if self._compression is not None:
            tape = hvd.DistributedGradientTape(tape, compression=self._compression)
        gradients = tape.gradient(loss, [v.value for v in variables])
        self._optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss


def channels_last(x: np.ndarray) -> np.ndarray:
    """The layout of images that TensorFlow has CPU kernels for."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


if __name__ == "__main__":
    tf.config.threading.set_intra_op_parallelism_threads(1)  # the ranks share the cores
    demo_training.main(Framework("TensorFlow", hvd, KerasTraining), __doc__)
