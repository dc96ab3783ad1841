"""One rank: wrapped optimizers, tapes and the stock adapter do what the plain ones do."""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
import tf_keras
from common import report
from tf_common import build_model, build_tf_keras_model, data, digest, loss_of

import ef_horovod.tensorflow as ef

METHOD = ef.EF21(ef.TopK(ratio=0.01))


def ours(optimizer):
    return ef.DistributedOptimizer(optimizer, METHOD)


def updates(optimizer):
    return ef.CompressedUpdates(optimizer, METHOD)


def unchanged(thing):
    return thing


def keras_fit(wrap, callbacks=()):
    model = build_model()
    model.compile(wrap(keras.optimizers.Adam(0.01)), loss=loss_of, jit_compile=False)
    model.fit(*data(0, 20), batch_size=16, verbose=0, shuffle=False, callbacks=list(callbacks))
    return digest([*model.trainable_variables, *model.optimizer.variables])


def tf_keras_fit(wrap):
    model = build_tf_keras_model()
    optimizer = tf_keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(wrap(optimizer, model), loss=loss_of)
    model.fit(*data(0, 20), batch_size=16, verbose=0, shuffle=False)
    return digest(model.trainable_variables)


def tape_loop(wrap, sources_of=unchanged):
    model, optimizer = build_model(), keras.optimizers.SGD(0.1, momentum=0.9)
    variables = model.trainable_variables
    optimizer.build(variables)
    wrap = wrap(variables)

    @tf.function
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(inputs))
        optimizer.apply(wrap(tape).gradient(loss, sources_of(variables)), variables)

    inputs, labels = data(0, 20)
    for i in range(0, len(inputs), 16):
        step(tf.constant(inputs[i : i + 16]), tf.constant(labels[i : i + 16]))
    return digest(variables)


def our_tape(variables):
    reducer = ef.Reducer(variables, METHOD)
    return lambda tape: ef.DistributedGradientTape(tape, compression=reducer)


def stock_tape(variables):
    adapter = ef.Compression(METHOD, variables)
    return lambda tape: hvd.DistributedGradientTape(tape, compression=adapter)


def stock_optimizer(optimizer, model):
    adapter = ef.Compression(METHOD, model.trainable_variables)
    return hvd.DistributedOptimizer(optimizer, compression=adapter)


def logs_of_one_rank():
    model = build_model()
    model.compile(ours(keras.optimizers.SGD(0.1)), loss=loss_of, jit_compile=False)
    callback = ef.TrainingCallback()
    history = model.fit(*data(0, 2), batch_size=16, verbose=0, callbacks=[callback]).history
    return {"stats": model.optimizer.stats(), "logs": sorted(history)}


hvd.init()
report(
    hvd.rank(),
    {
        "start": digest(build_model().trainable_variables),
        "keras.fit": [
            keras_fit(unchanged), keras_fit(ours), keras_fit(ours, [ef.TrainingCallback()]),
            keras_fit(updates),
        ],
        "tf_keras.fit": [
            tf_keras_fit(lambda optimizer, _: optimizer),
            tf_keras_fit(lambda optimizer, _: ours(optimizer)),
            tf_keras_fit(stock_optimizer),
        ],
        "tape": [
            tape_loop(lambda _: unchanged),
            tape_loop(our_tape),
            tape_loop(stock_tape, lambda variables: [v.value for v in variables]),
        ],
        "logs": logs_of_one_rank(),
    },
)  # fmt: skip
