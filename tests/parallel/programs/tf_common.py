"""What the TensorFlow programs of the parallel tests share: one small problem for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

tf.config.threading.set_intra_op_parallelism_threads(1)  # two cores, several ranks

INPUTS, CLASSES = 40, 10


def build_model(seed: int = 0) -> keras.Sequential:
    """A small network with compressed matrices and dense vectors; equal on all ranks."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((INPUTS,)),
            keras.layers.Dense(60, activation="tanh"),
            keras.layers.Dense(50),
            keras.layers.Dense(CLASSES),
        ]
    )


def loss_of(labels: Any, logits: Any) -> tf.Tensor:
    """Mean cross entropy of a batch."""
    labels = tf.reshape(tf.cast(labels, tf.int64), [-1])  # tf_keras brings them as a column
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def data(rank: int, batches: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Each rank's own inputs and labels of one linear problem."""
    inputs = np.random.default_rng(1000 + rank).standard_normal(
        (batches * size, INPUTS), dtype=np.float32
    )
    truth = np.random.default_rng(7).standard_normal((INPUTS, CLASSES), dtype=np.float32)
    return inputs, (inputs @ truth).argmax(1)


def digest(variables: Iterable[Any]) -> str:
    """Hash of all bits of variables, of Keras or of TensorFlow."""
    sha = hashlib.sha256()
    for variable in variables:
        sha.update(np.asarray(variable).tobytes())
    return sha.hexdigest()


def build_tf_keras_model(seed: int = 0) -> Any:
    """The same network in tf_keras, which takes a moment to import."""
    import tf_keras

    tf_keras.utils.set_random_seed(seed)
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Dense(60, activation="tanh"),
            tf_keras.layers.Dense(50),
            tf_keras.layers.Dense(CLASSES),
        ]
    )
    model.build((None, INPUTS))
    return model


def accuracy(model: Any) -> float:
    """Of a model on inputs that no rank trains on, the same for all ranks; by chance 0.1."""
    inputs, labels = data(999, 50)
    return float(np.mean(np.argmax(np.asarray(model(inputs)), 1) == labels))
