"""The ways to save a training with TensorFlow or Keras, under one interface."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
import tf_keras
from tf_common import CLASSES, INPUTS, build_model, data, loss_of

import ef_horovod.tensorflow as ef

STEPS, SIZE = 6, 16
# They draw from the step: it has to be saved, beside the memories.
EF21 = ef.EF21(ef.RandomK(ratio=0.05), momentum=0.5)
RANDOM = ef.ErrorFeedback(ef.RandomK(ratio=0.05))
TOP = ef.ErrorFeedback(ef.TopK(ratio=0.05))


class Loop:
    """A loop of one's own, its wrapped optimizer in a `tf.train.Checkpoint`."""

    passes: int | None = None

    def __init__(self, method: Any, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.model = build_model(seed)
        self.variables = self.model.trainable_variables
        self.inputs, self.labels = data(hvd.rank(), 2 * STEPS, SIZE)
        self.checkpoint = self.prepare(method)
        self._step = tf.function(self.step)

    def plain_optimizer(self) -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=self.passes)

    def prepare(self, method: Any) -> tf.train.Checkpoint:
        self.optimizer = ef.DistributedOptimizer(self.plain_optimizer(), compression=method)
        return tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)

    def step(self, inputs: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, self.model(inputs, training=True))
        self.optimizer.apply(tape.gradient(loss, self.variables), self.variables)

    def train(self, first: int, last: int) -> None:
        for i in range(first, last):
            part = slice(i * SIZE, (i + 1) * SIZE)
            self._step(tf.constant(self.inputs[part]), tf.constant(self.labels[part]))

    def save(self) -> None:
        self.checkpoint.write(str(self.folder / "checkpoint"))

    def restore(self) -> None:
        self.checkpoint.read(str(self.folder / "checkpoint"))


class AmidAccumulation(Loop):
    """Saved when two of four micro-batches have been added up."""

    passes = 4


class Tape(Loop):
    """A plain optimizer, averages from a tape, and the reducer in the checkpoint."""

    def prepare(self, method: Any) -> tf.train.Checkpoint:
        self.optimizer = self.plain_optimizer()
        self.reducer = ef.Reducer(self.variables, method)
        parts = {"model": self.model, "optimizer": self.optimizer, "reducer": self.reducer}
        return tf.train.Checkpoint(**parts)

    def step(self, inputs: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, self.model(inputs, training=True))
        tape = ef.DistributedGradientTape(tape, compression=self.reducer)
        self.optimizer.apply(tape.gradient(loss, self.variables), self.variables)


class Stock(Loop):
    """Horovod's own tape with `ef.Compression`, which is in the checkpoint."""

    def prepare(self, method: Any) -> tf.train.Checkpoint:
        self.optimizer = self.plain_optimizer()
        self.compression = ef.Compression(method, self.variables)
        parts = {"model": self.model, "optimizer": self.optimizer, "ef": self.compression}
        return tf.train.Checkpoint(**parts)

    def step(self, inputs: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, self.model(inputs, training=True))
        tape = hvd.DistributedGradientTape(tape, compression=self.compression)
        gradients = tape.gradient(loss, [v.value for v in self.variables])
        self.optimizer.apply(gradients, self.variables)


class Pickle(Loop):
    """Parameters, optimizer variables and `compression_state_dict()` as arrays in one pickle."""

    def save(self) -> None:
        self.optimizer.build(self.variables)
        values = [np.asarray(v) for v in [*self.variables, *self.optimizer.variables]]
        state = (values, self.optimizer.compression_state_dict())
        (self.folder / "state.pickle").write_bytes(pickle.dumps(state))

    def restore(self, *, memories: bool = True, **changes: Any) -> None:
        values, state = pickle.loads((self.folder / "state.pickle").read_bytes())
        self.optimizer.build(self.variables)
        for variable, value in zip(
            [*self.variables, *self.optimizer.variables], values, strict=True
        ):
            variable.assign(value)
        if memories:
            self.optimizer.load_compression_state_dict({**state, **changes})


class Weights(Loop):
    """Keras' `save_weights` and `load_weights` with the optimizer compiled into the model."""

    def prepare(self, method: Any) -> None:
        self.compile(ef.DistributedOptimizer(self.plain_optimizer(), compression=method))

    def compile(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(optimizer, loss=loss, jit_compile=False)

    def train(self, first: int, last: int) -> None:
        part = slice(first * SIZE, last * SIZE)
        self.fit(self.inputs[part], self.labels[part])

    def fit(self, inputs: np.ndarray, labels: np.ndarray, **options: Any) -> None:
        self.model.fit(inputs, labels, batch_size=SIZE, shuffle=False, verbose=0, **options)

    def save(self) -> None:
        self.model.save_weights(self.folder / "model.weights.h5")

    def restore(self) -> None:
        self.optimizer.build(self.variables)
        self.model.load_weights(self.folder / "model.weights.h5")


class WholeModel(Weights):
    """A `.keras` file: it gives a plain optimizer, which is wrapped again."""

    def prepare(self, method: Any) -> None:
        self.method = method
        super().prepare(method)

    def save(self) -> None:
        self.model.save(self.folder / "model.keras")
        state = self.optimizer.compression_state_dict()
        (self.folder / "compression.pickle").write_bytes(pickle.dumps(state))

    def restore(self) -> None:
        self.model = keras.models.load_model(self.folder / "model.keras")
        self.variables = self.model.trainable_variables
        plain = self.model.optimizer
        assert type(plain) is keras.optimizers.SGD, type(plain)
        self.compile(ef.DistributedOptimizer(plain, compression=self.method))
        state = pickle.loads((self.folder / "compression.pickle").read_bytes())
        self.optimizer.load_compression_state_dict(state)


class AccumulatingModel(WholeModel):
    """A `.keras` file of an optimizer that adds up micro-batches; saved between updates."""

    passes = 2


class Backup(Weights):
    """Keras' BackupAndRestore callback: an epoch is half the training here."""

    resumed = False

    def train(self, first: int, last: int) -> None:
        half = STEPS * SIZE
        callbacks: list[Any] = [ef.TrainingCallback()]
        if first == 0 or self.resumed:
            backup = self.folder / "backup"
            callbacks.append(keras.callbacks.BackupAndRestore(backup, delete_checkpoint=False))
        self.fit(
            self.inputs[:half],
            self.labels[:half],
            initial_epoch=0 if self.resumed else first // STEPS,
            epochs=last // STEPS,
            callbacks=callbacks,
        )

    def save(self) -> None:
        assert (self.folder / "backup").exists()

    def restore(self) -> None:
        self.resumed = True


class TFKeras(Loop):
    """tf_keras: `model.fit`, its optimizer in a `tf.train.Checkpoint`."""

    def prepare(self, method: Any) -> tf.train.Checkpoint:
        plain = tf_keras.optimizers.SGD(0.05, momentum=0.9)
        self.optimizer = ef.DistributedOptimizer(plain, compression=method)
        self.model = tf_keras.Sequential(
            [
                tf_keras.Input((INPUTS,)),
                tf_keras.layers.Dense(60, activation="tanh"),
                tf_keras.layers.Dense(CLASSES),
            ]
        )
        for variable, value in zip(self.model.weights, self.model_values(), strict=True):
            variable.assign(value)
        self.variables = self.model.trainable_variables
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(self.optimizer, loss=loss)
        return tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)

    def model_values(self) -> list[np.ndarray]:
        """Equal on all ranks, for tf_keras draws from a generator of its own."""
        generator = np.random.default_rng(3)
        return [0.1 * generator.standard_normal(v.shape) for v in self.model.weights]

    def train(self, first: int, last: int) -> None:
        part = slice(first * SIZE, last * SIZE)
        self.model.fit(
            self.inputs[part], self.labels[part], batch_size=SIZE, shuffle=False, verbose=0
        )


WAYS = (
    Loop, AmidAccumulation, Tape, Stock, Pickle, Weights, WholeModel, AccumulatingModel, Backup,
    TFKeras,
)  # fmt: skip
