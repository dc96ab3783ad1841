"""Two process sets of three ranks: {0, 2} trains one model, {1, 2} another one; and plain Keras."""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from common import report
from tf_common import build_model, data, digest, loss_of

import ef_horovod.tensorflow as ef

METHOD = ef.EF21(ef.TopK(ratio=0.05))


def train(average, optimizer, model):
    """Ten steps of this rank's own data; the hash of where they end."""
    variables = model.trainable_variables
    inputs, labels = data(hvd.rank(), 10)

    @tf.function
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(inputs, training=True))
        optimizer.apply(average(tape, loss, variables), variables)

    for i in range(10):
        part = slice(16 * i, 16 * i + 16)
        step(tf.constant(inputs[part]), tf.constant(labels[part]))
    return digest(variables)


def plain(tape, loss, variables):
    return tape.gradient(loss, variables)


def by_optimizer(process_set):
    optimizer = ef.DistributedOptimizer(
        keras.optimizers.SGD(0.05), compression=METHOD, process_set=process_set
    )
    end = train(plain, optimizer, build_model())
    return {"end": end, "rows": len(optimizer.stats())}


def by_tape(process_set):
    model = build_model()
    reducer = ef.Reducer(model.trainable_variables, METHOD, process_set=process_set)

    def average(tape, loss, variables):
        tape = ef.DistributedGradientTape(tape, compression=reducer)
        return tape.gradient(loss, variables)

    end = train(average, keras.optimizers.SGD(0.05), model)
    return {"end": end, "rows": len(reducer.stats())}


def main() -> None:
    first, second = hvd.ProcessSet([0, 2]), hvd.ProcessSet([1, 2])
    hvd.init(process_sets=[first, second])
    results = {"alone": train(plain, keras.optimizers.SGD(0.05), build_model())}
    for name, process_set in (("first", first), ("second", second)):
        results[f"optimizer {name}"] = by_optimizer(process_set)
        results[f"tape {name}"] = by_tape(process_set)
    report(hvd.rank(), results)
    hvd.allreduce(tf.zeros(1), name="end")  # a rank that ends early shuts Horovod down for all


main()
