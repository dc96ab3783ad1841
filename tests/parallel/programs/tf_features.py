"""Accumulation, clipping and the like, missing gradients; facts for the tests to judge."""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from common import error_of, report
from tf_common import build_model, data, digest, loss_of

import ef_horovod.tensorflow as ef

METHOD = ef.ErrorFeedback(ef.RandomK(ratio=0.2))  # smooth: rounding flips no choice of entries
UPDATES, PASSES, SIZE = 3, 4, 16


def micro_batches(rank=None):
    rank = hvd.rank() if rank is None else rank
    inputs, labels = data(rank, UPDATES * PASSES, SIZE)
    count = UPDATES * PASSES
    return list(zip(inputs.reshape(count, SIZE, -1), labels.reshape(count, SIZE), strict=True))


def sgd(**options):
    return keras.optimizers.SGD(0.05, momentum=0.9, **options)


def gradients_of(model, pair):
    with tf.GradientTape() as tape:
        inputs, labels = map(tf.convert_to_tensor, pair)
        loss = loss_of(labels, model(inputs, training=True))
    return tape.gradient(loss, model.trainable_variables)


def accumulated(optimizer, pairs=None, *, graph=True):
    """Micro-batches one by one into an optimizer that adds them up."""
    model, pairs = build_model(), micro_batches() if pairs is None else pairs

    def step(inputs, labels):
        optimizer.apply(gradients_of(model, (inputs, labels)), model.trainable_variables)

    step = tf.function(step) if graph else step
    for inputs, labels in pairs:
        step(tf.constant(inputs), tf.constant(labels))
    return end_of(model, optimizer)


def by_hand(factor):
    """The same, with sums of four gradients made outside."""
    model, pairs = build_model(), micro_batches()
    optimizer = ef.DistributedOptimizer(sgd(), compression=METHOD)
    for first in range(0, len(pairs), PASSES):
        sums = [tf.zeros_like(v) for v in model.trainable_variables]
        for pair in pairs[first : first + PASSES]:
            sums = [a + b for a, b in zip(sums, gradients_of(model, pair), strict=True)]
        optimizer.apply([total * factor for total in sums], model.trainable_variables)
    return end_of(model, optimizer)


def end_of(model, optimizer):
    total = optimizer.stats()[-1]
    return {
        "end": digest(model.trainable_variables),
        "values": flat(model)[::50].tolist(),
        "steps": [total.steps, total.skipped, int(optimizer.iterations)],
        "bytes": total.bytes_out,
        "config": optimizer.get_config()["gradient_accumulation_steps"],
    }


def flat(model):
    return np.concatenate([np.asarray(v).reshape(-1) for v in model.trainable_variables])


def accumulation():
    own = lambda: wrapped(sgd(gradient_accumulation_steps=PASSES))  # noqa: E731
    passes = {"backward_passes_per_step": PASSES}
    spoilt = micro_batches()
    if hvd.rank() == 1:
        spoilt[PASSES + 1] = (spoilt[PASSES + 1][0] * np.nan, spoilt[PASSES + 1][1])
    without = micro_batches()[:PASSES] + micro_batches()[2 * PASSES :]
    return {
        "one_batch": one_batch(),
        "by_hand_mean": by_hand(1 / PASSES),
        "by_hand_sum": by_hand(1.0),
        "keras": accumulated(own()),
        "keras_eager": accumulated(own(), graph=False),
        "keras_fit": fitted(own()),
        "passes_mean": accumulated(wrapped(sgd(), average_aggregated_gradients=True, **passes)),
        "passes_sum": accumulated(wrapped(sgd(), **passes)),
        "not_finite": accumulated(own(), spoilt),
        "without_that_update": accumulated(own(), without),
        "scaled": scaled(spoilt),
    }


def wrapped(optimizer, **options):
    return ef.DistributedOptimizer(optimizer, compression=METHOD, **options)


def one_batch():
    """Each update from one batch of four times the size: nothing is accumulated."""
    pairs = micro_batches()
    large = [
        tuple(np.concatenate(parts) for parts in zip(*pairs[i : i + PASSES], strict=True))
        for i in range(0, len(pairs), PASSES)
    ]
    return accumulated(wrapped(sgd()), large)


def fitted(optimizer):
    model = build_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=False)
    inputs, labels = data(hvd.rank(), UPDATES * PASSES, SIZE)
    model.fit(inputs, labels, batch_size=SIZE, shuffle=False, verbose=0)
    return end_of(model, optimizer)


def scaled(pairs):
    """A loss scaler with accumulation inside; the scale follows updates, not micro-batches."""
    inner = sgd(gradient_accumulation_steps=PASSES)
    optimizer = wrapped(keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**10))
    model = build_model()
    variables = model.trainable_variables

    @tf.function
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(loss_of(labels, model(inputs, training=True)))
        optimizer.apply(tape.gradient(loss, variables), variables)

    for inputs, labels in pairs:
        step(tf.constant(inputs), tf.constant(labels))
    config = optimizer.get_config()["inner_optimizer"]["config"]
    return {
        "end": digest(variables),
        "scale": float(optimizer.dynamic_scale),
        "config": config["gradient_accumulation_steps"],
    }


def on_averages():
    """Keras' own options, here and in plain Keras that is fed with averages of both ranks."""
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.3, staircase=True)
    options = {
        "plain": {},
        "clipnorm": {"clipnorm": 0.05},
        "global_clipnorm": {"global_clipnorm": 0.1},
        "clipvalue": {"clipvalue": 0.002},
        "weight_decay": {"weight_decay": 0.1},
        "use_ema": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        "schedule": {"learning_rate": decay},
    }
    facts = {}
    for name, option in options.items():
        make = lambda option=option: keras.optimizers.SGD(  # noqa: E731
            **({"learning_rate": 0.1, "momentum": 0.9} | option)
        )
        facts[name] = {
            "distributed": trained(ef.DistributedOptimizer(make()), local_gradients),
            "reference": trained(make(), average_gradients),
        }
    return facts


def trained(optimizer, gradients_from):
    model = build_model()
    for step in range(5):
        optimizer.apply(gradients_from(model, step), model.trainable_variables)
    return digest([*model.trainable_variables, *optimizer.variables])


def local_gradients(model, step):
    return gradients_of(model, micro_batches()[step])


def average_gradients(model, step):
    first, second = (gradients_of(model, micro_batches(rank)[step]) for rank in (0, 1))
    return [(a + b) / 2 for a, b in zip(first, second, strict=True)]


def missing():
    """The last but one layer gets no gradient; the others train."""
    facts = {}
    for way in ("reducer", "optimizer"):
        model = build_model()
        kernels = [layer.kernel for layer in model.layers]
        optimizer = wrapped(sgd())
        reducer = ef.Reducer(kernels, METHOD)
        starts = [digest([kernel]) for kernel in kernels]
        for inputs, _ in micro_batches()[:3]:
            gradients = partial_gradients(kernels, inputs)
            if way == "reducer":
                gradients = reducer.reduce(gradients)
            else:
                optimizer.apply(gradients, kernels)
        facts[way] = {
            "none": [gradient is None for gradient in gradients],
            "changed": [digest([k]) != start for k, start in zip(kernels, starts, strict=True)],
            "end": digest(kernels),
        }
    return facts


def partial_gradients(kernels, inputs):
    with tf.GradientTape() as tape:
        hidden = tf.constant(inputs) @ kernels[0]
        loss = tf.reduce_mean(tf.square(hidden)) + tf.reduce_mean(tf.square(kernels[2].value))
    return tape.gradient(loss, kernels)


def changed_later():
    """A gradient that is missing or sparse, but was not at the first step, or the other way."""
    shape = (40, 40)
    dense = [tf.ones(shape), tf.ones(shape)]
    rows = tf.IndexedSlices(tf.ones((2, 40)), tf.constant([0, 3]), tf.constant(shape))
    later = {"missing": [dense[0], None], "sparse": [dense[0], rows], "back": dense}
    facts = {}
    for name, gradients in later.items():
        variables = [tf.Variable(tf.zeros(shape), name=part) for part in ("first", "second")]
        reducer, optimizer = ef.Reducer(variables, METHOD), wrapped(sgd())
        start = [dense[0], None] if name == "back" else dense
        reducer.reduce(start)
        optimizer.apply(start, variables)
        facts[name] = [
            error_of(lambda r=reducer, g=gradients: r.reduce(g)),
            error_of(lambda o=optimizer, g=gradients, v=variables: o.apply(g, v)),
        ]
    return facts


def main() -> None:
    hvd.init()
    scenarios = (accumulation, on_averages, missing, changed_later)
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})
    hvd.allreduce(tf.zeros(1), name="end")  # a rank that ends early shuts Horovod down for all


main()
