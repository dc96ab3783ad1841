"""A TensorFlow training with servers that is interrupted and goes on; the optimizer has a momentum.

Arguments: the folder for states; then for each job, one after the other, "PHASE WAY". Phases are
"whole" (all steps), "first" (to a checkpoint in the middle) and "second" (from there on); ways are
"eager" and "fit".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from common import ARGUMENTS, error_of, report
from meeting import meet
from tf_common import build_model, data, digest, loss_of

import ef_horovod.tensorflow as ef

FOLDER, JOBS = Path(ARGUMENTS[0]), ARGUMENTS[1:]
STEPS, SIZE = 6, 16  # in each half
METHODS = {
    "eager": ef.DoubleSqueeze(ef.TopK(0.05), server_compressor=ef.RandomK(0.2)),
    "fit": ef.EF21(ef.TopK(0.1), momentum=0.5, server_compressor=ef.TopK(0.1)),
}


class Eager:
    """A loop of one's own, saved by `tf.train.Checkpoint`."""

    def __init__(self, phase: str, way: str) -> None:
        self.model = build_model(seed=phase == "second")  # other weights, to be overwritten
        self.variables = self.model.trainable_variables
        self.optimizer = ef.DistributedOptimizer(
            keras.optimizers.SGD(0.05, momentum=0.9),
            METHODS[way],
            exchange="server",
            bucket_bytes=4,
        )
        self.rank = self.optimizer.transport.rank
        self.inputs, self.labels = data(self.rank, 2 * STEPS, SIZE)
        name = f"whole {way}" if phase == "whole" else way
        self.file = str(FOLDER / f"{name}, worker{self.rank}")
        self.errors = [error_of(self.optimizer.checkpoint)]
        self.prepare()

    def prepare(self) -> None:
        self.saver = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)

    def step(self, i: int, factor: float = 1.0) -> None:
        part = slice(i * SIZE, (i + 1) * SIZE)
        with tf.GradientTape() as tape:
            loss = factor * loss_of(self.labels[part], self.model(self.inputs[part]))
        self.optimizer.apply(tape.gradient(loss, self.variables), self.variables)

    def first_half(self) -> None:
        for i in range(STEPS):
            self.step(i)
        self.step(STEPS, np.nan if self.rank else 1.0)  # dropped
        self.optimizer.checkpoint()
        self.saver.write(self.file)

    def second_half(self) -> None:
        for i in range(STEPS, 2 * STEPS):
            self.step(i)

    def restore(self) -> None:
        self.saver.read(self.file)


class Fit(Eager):
    """Keras' loop, an epoch for each half, saved by a callback as Keras' weights."""

    def prepare(self) -> None:
        self.model.compile(self.optimizer, loss_of, jit_compile=False)
        self.optimizer.build(self.variables)
        self.file += ".weights.h5"

    def epochs(self, first: int, last: int) -> None:
        def save(epoch, logs):
            if epoch == 0:
                self.optimizer.checkpoint()
                self.model.save_weights(self.file)

        for epoch in range(first, last):  # of other data
            part = slice(epoch * STEPS * SIZE, (epoch + 1) * STEPS * SIZE)
            self.model.fit(
                self.inputs[part],
                self.labels[part],
                batch_size=SIZE,
                shuffle=False,
                verbose=0,
                initial_epoch=epoch,
                epochs=epoch + 1,
                callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=save)],
            )

    def first_half(self) -> None:
        self.epochs(0, 1)

    def second_half(self) -> None:
        self.epochs(1, 2)

    def restore(self) -> None:
        self.model.load_weights(self.file)


def run(phase: str, way: str) -> tuple[int, dict[str, Any]]:
    """One job; this worker's rank, and what it found."""
    training = {"eager": Eager, "fit": Fit}[way](phase, way)
    if phase == "second":
        training.restore()
    else:
        training.first_half()
    if phase == "whole":
        training.errors.append(error_of(training.restore))
    if phase != "first":
        training.second_half()
    variables = [*training.variables, *training.optimizer.variables]
    steps = training.optimizer.stats()[-1].steps
    training.optimizer.transport.close()
    return training.rank, {"end": digest(variables), "steps": steps, "errors": training.errors}


def main() -> None:
    meet()
    found = {}
    for job in JOBS:
        rank, found[job] = run(*job.split())
    report(rank, found)


main()
