"""Keras' models of all kinds, trained by `fit`, for tf_use.py; by tf_keras perhaps a sample."""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
import tf_keras
from common import ARGUMENTS, error_of
from tf_common import CLASSES, INPUTS, data, digest, loss_of

import ef_horovod.tensorflow as ef

METHOD = ef.ErrorFeedback(ef.TopK(ratio=0.05))
FAMILIES = {"keras": keras, "tf_keras": tf_keras}


def classifier(package, seed, **options):
    package.utils.set_random_seed(seed)
    layers = package.layers
    return package.Sequential(
        [layers.Dense(60, activation="tanh"), layers.Dense(50), layers.Dense(CLASSES)], **options
    )


def sgd(package, method=METHOD):
    return ef.DistributedOptimizer(package.optimizers.SGD(0.05, momentum=0.9), method)


def fit(model, *callbacks, **options):
    """Train each rank on its own data; what tests look at."""
    inputs, labels = data(hvd.rank(), 8)
    error = error_of(
        lambda: model.fit(
            inputs, labels, batch_size=16, epochs=2, verbose=0, shuffle=False,
            callbacks=[ef.TrainingCallback(), *callbacks], **options,
        )
    )  # fmt: skip
    return {"error": error, "end": digest(model.weights) if not error else ""}


def unbuilt(package, *, built=False, **options):
    model = classifier(package, seed=hvd.rank())
    if built:
        model.build((None, INPUTS))
    model.compile(sgd(package), loss_of, **options)
    return fit(model)


def subclassed(package, *, built=False, **options):
    class Net(package.Model):
        def __init__(self):
            super().__init__()
            self.inner = classifier(package, seed=hvd.rank())

        def call(self, inputs):
            return self.inner(inputs)

    model = Net()
    if built:
        model(np.zeros((1, INPUTS), np.float32))
    model.compile(sgd(package), loss_of, **options)
    return fit(model)


def eager(package):
    """Built by the first batch with each rank's own values; nothing of it may stay in memories."""
    model = classifier(package, seed=hvd.rank())
    optimizer = sgd(package)
    model.compile(optimizer, loss_of, run_eagerly=True)
    norms = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            parameters = optimizer.compression_state_dict()["parameters"].values()
            norms.append(sum(float(np.abs(p.get("worker.error", 0)).sum()) for p in parameters))

        def __getattr__(self, name):  # tf_keras asks whether there are hooks
            if name.startswith("_implements_"):
                return lambda: name == "_implements_train_batch_hooks"
            raise AttributeError(name)

    return fit(model, Look()) | {"first": norms[:1], "last": norms[-1:]}


def distillation(package):
    """The teacher is a part of the model, is not frozen, and must not move."""
    layers = package.layers

    class Distiller(package.Model):
        def __init__(self):
            super().__init__()
            self.student = package.Sequential([layers.Dense(60), layers.Dense(CLASSES)])
            self.teacher = package.Sequential([layers.Dense(60), layers.Dense(CLASSES)])

        def call(self, inputs):
            return self.student(inputs) + 0.0 * self.teacher(inputs)

        def train_step(self, batch):
            inputs, labels = batch
            soft = tf.nn.softmax(self.teacher(inputs))
            with tf.GradientTape() as tape:
                logits = self.student(inputs)
                away = tf.nn.softmax_cross_entropy_with_logits(soft, logits)
                loss = loss_of(labels, logits) + 0.1 * tf.reduce_mean(away)
            variables = self.student.trainable_variables
            gradients = tape.gradient(loss, variables)
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return {"loss": loss}

    package.utils.set_random_seed(hvd.rank())
    model = Distiller()
    model(np.zeros((1, INPUTS), np.float32))
    before = digest(model.teacher.weights)
    model.compile(sgd(package))
    result = fit(model)
    return result | {"teacher": [before, digest(model.teacher.weights)]}


def gan(package, optimizers=2):
    """Not built; with an optimizer for each half, or with one for both."""
    layers = package.layers

    class GAN(package.Model):
        def __init__(self):
            super().__init__()
            self.generator = package.Sequential([layers.Dense(60), layers.Dense(INPUTS)])
            self.discriminator = package.Sequential([layers.Dense(60), layers.Dense(1)])

        def compile(self, first, second):
            super().compile(first)
            self.first, self.second = first, second

        def train_step(self, batch):
            real, _ = batch
            noise = tf.random.stateless_normal((16, 20), (1, 2))
            losses = {}
            for name, part, sign, optimizer in (
                ("d", self.discriminator, 1.0, self.first),
                ("g", self.generator, -1.0, self.second),
            ):
                with tf.GradientTape() as tape:
                    fake = self.discriminator(self.generator(noise))
                    loss = tf.reduce_mean(tf.nn.softplus(sign * fake))
                    loss += tf.reduce_mean(tf.nn.softplus(-self.discriminator(real)))
                variables = part.trainable_variables
                gradients = tape.gradient(loss, variables)
                optimizer.apply_gradients(zip(gradients, variables, strict=True))
                losses[name] = loss
            return losses

    package.utils.set_random_seed(hvd.rank())
    model = GAN()
    if optimizers == 1:
        model.generator.build((None, 20))
        model.discriminator.build((None, INPUTS))
        model.built = True
    first = sgd(package)
    second = sgd(package) if optimizers == 2 else first
    model.compile(first, second)
    return fit(model)


def keras_models():
    return {
        family: some_models(package)
        | ({} if family == "tf_keras" and ARGUMENTS == ["sample"] else other_models(package))
        for family, package in FAMILIES.items()
    }


def some_models(package):
    return {
        "unbuilt": unbuilt(package),
        "unbuilt, built before": unbuilt(package, built=True),
        "eager": eager(package),
        "gan": gan(package),
    }


def other_models(package):
    return {
        "subclassed": subclassed(package, steps_per_execution=4),
        "subclassed, built before": subclassed(package, built=True, steps_per_execution=4),
        "distillation": distillation(package),
        "gan, one optimizer": gan(package, optimizers=1),
    }
