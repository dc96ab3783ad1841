"""Every way to train with TensorFlow: 60 steps each; digests, accuracies and traces."""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from common import report
from tf_common import (
    INPUTS,
    accuracy,
    build_model,
    build_tf_keras_model,
    data,
    digest,
    loss_of,
)

import ef_horovod.tensorflow as ef

STEPS, EAGER_STEPS = 60, 30
METHOD = ef.EF21(ef.TopK(ratio=0.05))


class Counted(keras.Sequential):
    """Counts its traces: a traced `train_step` is Python code that runs once a trace."""

    traces = 0

    def train_step(self, *args):
        self.traces += 1
        return super().train_step(*args)


def facts(model, start, stats, traces=None):
    total = stats[-1]
    return {
        "start": start,
        "end": digest(model.trainable_variables),
        "accuracy": accuracy(model),
        "ratio": total.bytes_out / total.dense_bytes_out,
        "steps": total.steps,
        "traces": traces,
    }


def run(step, steps=STEPS):
    """A loop over this rank's batches, as tensors, so that only a real reason retraces."""
    inputs, labels = data(hvd.rank(), steps)
    for i in range(steps):
        batch = slice(16 * i, 16 * i + 16)
        step(tf.constant(inputs[batch]), tf.constant(labels[batch]))


def loop(model, gradients_of, apply):
    """A tf.function of a step: tape, gradients, update."""

    @tf.function
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(inputs, training=True))
        apply(gradients_of(tape, loss))

    run(step)
    return step.experimental_get_tracing_count()


def tape(wrap_in_function, steps):
    model, optimizer = build_model(), keras.optimizers.SGD(0.1, momentum=0.5)
    variables = model.trainable_variables
    optimizer.build(variables)
    reducer = ef.Reducer(variables, METHOD)
    start = digest(variables)

    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(inputs, training=True))
        tape = ef.DistributedGradientTape(tape, compression=reducer)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    step = wrap_in_function(step)
    run(step, steps)
    traces = getattr(step, "experimental_get_tracing_count", lambda: None)()
    return facts(model, start, reducer.stats(), traces)


def tape_in_a_function():
    return tape(tf.function, STEPS)


def tape_in_eager_mode():
    return tape(lambda step: step, EAGER_STEPS)


def keras_loop(use_apply):
    model = build_model()
    optimizer = ef.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.5), METHOD)
    variables = model.trainable_variables
    optimizer.build(variables)
    start = digest(variables)

    def apply(gradients):
        if use_apply:
            optimizer.apply(gradients)
        else:
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

    traces = loop(model, lambda tape, loss: tape.gradient(loss, variables), apply)
    return facts(model, start, optimizer.stats(), traces)


def keras_apply():
    return keras_loop(use_apply=True)


def keras_apply_gradients():
    return keras_loop(use_apply=False)


def keras_fit(steps=STEPS, wrap=None, **options):
    model = Counted(build_model().layers)
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(wrap(optimizer) if wrap else optimizer, loss_of, jit_compile=False, **options)
    start = digest(model.trainable_variables)
    inputs, labels = data(hvd.rank(), steps // 2)
    model.fit(inputs, labels, batch_size=16, epochs=2, verbose=0)
    return facts(model, start, model.optimizer.stats(), model.traces) if wrap else model.traces


def compressed(optimizer):
    return ef.DistributedOptimizer(optimizer, METHOD)


def keras_fit_of_single_steps():
    return keras_fit(wrap=compressed)


def keras_fit_of_several_steps_at_once():
    return keras_fit(wrap=compressed, steps_per_execution=4)


def tf_keras_fit(steps=STEPS, wrap=None):
    """`wrap` gives an optimizer, and what knows how much was sent."""
    import tf_keras

    class CountedToo(tf_keras.Sequential):
        traces = 0

        def train_step(self, batch):
            self.traces += 1
            return super().train_step(batch)

    model = CountedToo(build_tf_keras_model().layers)
    model.build((None, INPUTS))
    start = digest(model.trainable_variables)
    optimizer = tf_keras.optimizers.SGD(0.1, momentum=0.5)
    optimizer, sender = wrap(optimizer, model) if wrap else (optimizer, None)
    model.compile(optimizer, loss=loss_of)
    inputs, labels = data(hvd.rank(), steps // 2)
    model.fit(inputs, labels, batch_size=16, epochs=2, verbose=0)
    return facts(model, start, sender.stats(), model.traces) if sender else model.traces


def tf_keras_fit_of_single_steps():
    def wrap(optimizer, model):
        wrapped = compressed(optimizer)
        return wrapped, wrapped

    return tf_keras_fit(wrap=wrap)


def stock_tf_keras_fit():
    def wrap(optimizer, model):
        adapter = ef.Compression(METHOD, model.trainable_variables)
        return hvd.DistributedOptimizer(optimizer, compression=adapter), adapter

    return tf_keras_fit(wrap=wrap)


def tf_keras_loop():
    import tf_keras

    model = build_tf_keras_model()
    variables = model.trainable_variables
    optimizer = ef.DistributedOptimizer(tf_keras.optimizers.SGD(0.1, momentum=0.5), METHOD)
    optimizer.build(variables)
    start = digest(variables)
    traces = loop(
        model,
        lambda tape, loss: tape.gradient(loss, variables),
        lambda gradients: optimizer.apply_gradients(zip(gradients, variables, strict=True)),
    )
    return facts(model, start, optimizer.stats(), traces)


def stock_tape():
    model, optimizer = build_model(), keras.optimizers.SGD(0.1, momentum=0.5)
    variables = model.trainable_variables
    optimizer.build(variables)
    start = digest(variables)
    compression = ef.Compression(METHOD, variables)

    def gradients_of(tape, loss):
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, [variable.value for variable in variables])

    traces = loop(model, gradients_of, lambda gradients: optimizer.apply(gradients, variables))
    return facts(model, start, compression.stats(), traces)


def traces_of_plain_optimizers():
    """Keras traces a step more than once by itself: that many is no fault of ours."""
    return {"keras": keras_fit(steps=8), "tf_keras": tf_keras_fit(steps=8)}


def main() -> None:
    hvd.init()
    scenarios = (
        tape_in_a_function, tape_in_eager_mode, keras_apply, keras_apply_gradients,
        keras_fit_of_single_steps, keras_fit_of_several_steps_at_once,
        tf_keras_fit_of_single_steps, tf_keras_loop, stock_tape, stock_tf_keras_fit,
        traces_of_plain_optimizers,
    )  # fmt: skip
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
