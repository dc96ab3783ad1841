"""What must be refused, in time and with a way out. Rank 1 is the odd one out."""

from __future__ import annotations

import os
import time

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
import tf_keras
from common import error_of, report
from tf_common import build_model, build_tf_keras_model, data, loss_of

import ef_horovod.tensorflow as ef

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)  # for a strategy of two replicas

METHOD = ef.EF21(ef.TopK(ratio=0.05))
SGD = keras.optimizers.SGD


def odd():
    return hvd.rank() == 1


def fit(model, optimizer, **options):
    model.compile(optimizer, loss_of, **options)
    model.fit(*data(hvd.rank(), 2), batch_size=16, verbose=0)


def variables_of(width=60, count=2):
    return [tf.Variable(tf.zeros((40, width)), name="kernel") for _ in range(count)]


def reduce(variables, *, method=METHOD, wrap=tf.function, gradients=None, **options):
    """One step of a reducer, with gradients of ones."""
    reducer = ef.Reducer(variables, method, **options)
    ones = [tf.ones(v.shape) for v in variables] if gradients is None else gradients
    wrap(lambda: [g for g in reducer.reduce(ones) if g is not None])()


def stock_reduce(method, **options):
    (variable,) = variables_of(count=1)
    adapter = ef.Compression(method, [variable])

    @tf.function(**options)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable)
        return hvd.DistributedGradientTape(tape, compression=adapter).gradient(loss, [variable])

    step()


def stock_without(place, rows=False):
    """A step of Horovod's tape in which a variable has rows as its gradient, or none."""
    variables = variables_of(count=3)
    adapter = ef.Compression(METHOD, variables)
    with tf.GradientTape() as tape:
        losses = [tf.reduce_sum(v) for i, v in enumerate(variables) if i != place]
        if rows:
            losses.append(tf.reduce_sum(tf.gather(variables[place], [1])))
        loss = tf.add_n(losses)
    hvd.DistributedGradientTape(tape, compression=adapter).gradient(loss, variables)


def disagreements():
    """(error, seconds) of steps that differ between ranks in one thing each."""
    topk = ef.ErrorFeedback(ef.TopK(ratio=0.02 if odd() else 0.01))
    actions = {
        "compressor": lambda: reduce(variables_of(), method=topk),
        "compressor, eager": lambda: reduce(variables_of(), method=topk, wrap=lambda f: f),
        "compressor, stock": lambda: stock_reduce(topk),
        "compressor, fit": lambda: fit(build_model(), ef.DistributedOptimizer(SGD(), topk)),
        "compressor, tf_keras": lambda: fit(
            build_tf_keras_model(), ef.DistributedOptimizer(tf_keras.optimizers.SGD(), topk)
        ),
        "shape": lambda: reduce(variables_of(61 if odd() else 60)),
        "number of variables": lambda: reduce(variables_of(count=3 if odd() else 2)),
        "seed": lambda: reduce(variables_of(), seed=hvd.rank()),
        "op": lambda: reduce(variables_of(), op=hvd.Sum if odd() else hvd.Average),
        "exchange": lambda: reduce(
            variables_of(),
            method=ef.ErrorFeedback(ef.RandomK(0.1)),
            exchange="gather" if odd() else "reduce",
        ),
        "buckets": lambda: reduce(variables_of(), bucket_bytes=10_000 if odd() else 100_000),
    }
    return {what: timed(action) for what, action in actions.items()}


def timed(action):
    begin = time.monotonic()
    return [error_of(action), time.monotonic() - begin]


def xla():
    model, wrapped = build_model(), ef.DistributedOptimizer(SGD(), METHOD)
    other, ours = build_tf_keras_model(), ef.DistributedOptimizer(tf_keras.optimizers.SGD(), METHOD)
    return {
        "jit, function": error_of(
            lambda: reduce(variables_of(), wrap=lambda f: tf.function(f, jit_compile=True))
        ),
        "jit, stock": error_of(lambda: stock_reduce(METHOD, jit_compile=True)),
        "jit, fit": error_of(lambda: fit(model, wrapped, jit_compile=True)),
        "jit, tf_keras": error_of(lambda: fit(other, ours, jit_compile=True)),
    }


def options():
    """Arguments that cannot work."""
    (variable,) = variables_of(count=1)
    accumulating = SGD(gradient_accumulation_steps=2)
    return {
        "adasum": error_of(lambda: ef.Reducer([variable], METHOD, op=hvd.Adasum)),
        "adasum, optimizer": error_of(
            lambda: built(ef.DistributedOptimizer(SGD(), METHOD, op=hvd.Adasum))
        ),
        "compressor": error_of(lambda: ef.DistributedOptimizer(SGD(), ef.TopK(ratio=0.1))),
        "compressor, reducer": error_of(lambda: ef.Reducer([variable], ef.OneBit())),
        "compressor, stock": error_of(lambda: ef.Compression(ef.OneBit(), [variable])),
        "compressor, tape": error_of(lambda: taped(variable, compression=ef.OneBit())),
        "horovod's": error_of(lambda: ef.DistributedOptimizer(SGD(), hvd.Compression.fp16)),
        "passes": error_of(lambda: ef.DistributedOptimizer(SGD(), backward_passes_per_step=0)),
        "passes twice": error_of(
            lambda: ef.DistributedOptimizer(accumulating, backward_passes_per_step=2)
        ),
        "none": error_of(lambda: ef.Reducer([])),
        "model": error_of(lambda: ef.Reducer(build_model())),
        "model, stock": error_of(lambda: ef.Compression(METHOD, build_tf_keras_model())),
        "model, broadcast": error_of(lambda: ef.broadcast_variables(build_model())),
        "model, in sync": error_of(lambda: ef.require_in_sync(build_model())),
        "model, tape": error_of(lambda: tf_taped(build_model())),
        "one variable": error_of(lambda: ef.Reducer(variable, METHOD)),
        "names": error_of(lambda: ef.Reducer({"kernel": variable}, METHOD)),
        "changed places": error_of(lambda: ef.Compression([variable], METHOD)),
        "changed places, reducer": error_of(lambda: ef.Reducer(METHOD, [variable])),
        "twice": error_of(lambda: ef.Reducer([variable, variable])),
        "complex": error_of(lambda: ef.Reducer([tf.Variable(tf.zeros(3, tf.complex64))])),
        "reducer's": error_of(
            lambda: taped(variable, compression=ef.Reducer([variable]), seed=3)
        ),
    }  # fmt: skip


def built(optimizer):
    optimizer.build(variables_of())


def taped(source, **options):
    with tf.GradientTape() as tape:
        tape.watch(source)
        loss = tf.reduce_sum(source * 2.0)
    return ef.DistributedGradientTape(tape, **options).gradient(loss, [source])


def tf_taped(model):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(tf.zeros((1, 40))))
    ef.DistributedGradientTape(tape, METHOD).gradient(loss, model)


def optimizers():
    """Optimizers that cannot be wrapped, or not in this way."""
    wrapped = ef.DistributedOptimizer(SGD(), METHOD)
    stock = hvd.DistributedOptimizer(tf_keras.optimizers.SGD())
    ours = ef.DistributedOptimizer(tf_keras.optimizers.SGD(), METHOD)
    return {
        "ours twice": error_of(lambda: ef.DistributedOptimizer(wrapped, METHOD)),
        "ours twice, tf_keras": error_of(lambda: ef.DistributedOptimizer(ours, METHOD)),
        "stock's again": error_of(lambda: ef.DistributedOptimizer(stock, METHOD)),
        "legacy": error_of(
            lambda: ef.DistributedOptimizer(tf_keras.optimizers.legacy.SGD(), METHOD)
        ),
        "no optimizer": error_of(lambda: ef.DistributedOptimizer("sgd", METHOD)),
        "state too early": error_of(lambda: wrapped.load_compression_state_dict({})),
    }


def steps():
    """Steps that a wrapped optimizer, a tape or a reducer cannot take."""
    first, second = variables_of(), variables_of()
    optimizer = ef.DistributedOptimizer(SGD(), METHOD)
    ones = [tf.ones(v.shape) for v in first]
    optimizer.apply(ones, first)
    reducer = ef.Reducer(first, METHOD)
    reducer.reduce(ones)
    adapter = ef.Compression(METHOD, first)
    return {
        "other variables": error_of(lambda: optimizer.apply(ones, second)),
        "fewer gradients": error_of(lambda: reducer.reduce(ones[:1])),
        "another order": error_of(lambda: reducer.reduce([tf.transpose(ones[0]), *ones[1:]])),
        "integers": error_of(lambda: reducer.reduce([tf.cast(ones[0], tf.int32), *ones[1:]])),
        "tensor": error_of(lambda: taped(tf.ones((40, 60)), compression=METHOD)),
        "missing, stock": error_of(lambda: stock_without(1 if odd() else 0)),
        "rows, stock": error_of(lambda: stock_without(1, rows=True)),
        "another shape": error_of(lambda: adapter.compress(tf.ones((41, 60)))),
        "replicas": error_of(lambda: in_replicas(lambda: reducer.reduce(ones))),
    }


def in_replicas(action):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        action()


def loss_scalers():
    """A scaler outside would let ranks without a NaN step alone."""
    keras.config.set_dtype_policy("mixed_float16")
    by_keras = error_of(lambda: fit(build_model(), ef.DistributedOptimizer(SGD(), METHOD)))
    keras.config.set_dtype_policy("float32")
    outside = keras.optimizers.LossScaleOptimizer(ef.DistributedOptimizer(SGD(), METHOD))
    accumulating = tf_keras.mixed_precision.LossScaleOptimizer(
        ef.DistributedOptimizer(tf_keras.optimizers.SGD(), METHOD, backward_passes_per_step=2)
    )
    return {
        "scaler by keras": by_keras,
        "scaler outside": error_of(lambda: fit(build_model(), outside)),
        "scaler, accumulation": error_of(lambda: fit(build_tf_keras_model(), accumulating)),
    }


def elastic():
    os.environ["HOROVOD_ELASTIC"] = "1"
    (variable,) = variables_of(count=1)
    errors = {
        "elastic": error_of(lambda: ef.Reducer([variable], METHOD)),
        "elastic, stock": error_of(lambda: ef.Compression(METHOD, [variable])),
        "elastic, optimizer": error_of(lambda: built(ef.DistributedOptimizer(SGD(), METHOD))),
    }
    del os.environ["HOROVOD_ELASTIC"]
    return errors


def a_good_step_after_all_that():
    """Nothing of what was refused is left over."""
    (variable,) = variables_of(count=1)
    reducer = ef.Reducer([variable])
    (average,) = reducer.reduce([tf.fill(variable.shape, float(hvd.rank()))])
    return float(np.unique(average.numpy()).item())


def joining():
    reducer = ef.Reducer(variables_of(), METHOD)
    return {"join": error_of(hvd.join) if reducer.active else ""}


def main() -> None:
    hvd.init()
    refusals = (joining, xla, options, optimizers, steps, loss_scalers, elastic)
    report(
        hvd.rank(),
        {
            "disagreements": disagreements(),
            "refused": {k: v for refusal in refusals for k, v in refusal().items()},
            "good": a_good_step_after_all_that(),
        },
    )


main()
