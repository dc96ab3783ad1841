"""Trainings in TensorFlow that `benchmarks/bandwidth.py` times; see `bandwidth_torch.py`."""

from __future__ import annotations

import os
from typing import Any

os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from bandwidth_plan import MODELS, WAYS, Case

import ef_horovod.tensorflow as ef
from ef_horovod.methods.parsing import read_method

_SAMPLES = 512


class Trainings:
    """The MLP under Horovod; arguments as for PyTorch's."""

    def __init__(self, group: str, peers: Any, data: str | None) -> None:
        hvd.init()
        self._peers = peers

    def make(self, case: Case) -> Training:
        """A training of a case; all ranks call it."""
        if case.model != "mlp":
            raise ValueError(
                f"got the model {case.model}, expected mlp: it is TensorFlow's only one"
            )
        keras.utils.set_random_seed(0)
        rng = np.random.default_rng(self._peers.rank)
        inputs = rng.standard_normal((_SAMPLES, 784), np.float32)
        return Training(case, inputs, rng.integers(0, 10, _SAMPLES))


class Training:
    """A Keras model with SGD and momentum in a tf.function."""

    data = "random"

    def __init__(self, case: Case, inputs: np.ndarray, labels: np.ndarray) -> None:
        way, self._batch, self._at = WAYS[case.way], MODELS[case.model].batch, 0
        layers = [keras.layers.Dense(1536, "relu"), keras.layers.Dense(1536, "relu")]
        self._model = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
        self._inputs, self._labels = tf.constant(inputs), tf.constant(labels)
        self.parameters, self.exchange = self._model.count_params(), way.exchange
        self._optimizer: Any = keras.optimizers.SGD(0.001, momentum=0.9)
        self._ours = way.ours
        if way.ours:
            method = read_method(way.method)
            self._optimizer = ef.DistributedOptimizer(
                self._optimizer, method, exchange=way.exchange
            )
        self._optimizer.build(self._model.trainable_variables)
        self._step = tf.function(self._train)

    def _train(self, inputs: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            logits = self._model(inputs, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        variables = self._model.trainable_variables
        if self._ours:
            gradients = tape.gradient(loss, variables)
        else:
            tape = hvd.DistributedGradientTape(tape)
            gradients = tape.gradient(loss, [variable.value for variable in variables])
        self._optimizer.apply_gradients(zip(gradients, variables, strict=True))

    def step(self) -> None:
        """One batch."""
        part = slice(self._at, self._at + self._batch)
        self._at = (self._at + self._batch) % _SAMPLES
        self._step(self._inputs[part], self._labels[part])

    def sent(self) -> int | None:
        """Bytes that this rank sent so far, by `stats()`."""
        return self._optimizer.stats()[-1].bytes_out if self._ours else None

    def phases(self) -> list[float]:
        """Seconds of compressing, waiting and decompressing so far."""
        if not self._ours:
            return [0.0] * 3
        total = self._optimizer.stats()[-1]
        return [total.seconds_compress, total.seconds_wait, total.seconds_decompress]

    def close(self) -> None:
        """Nothing to leave."""
