"""Two process sets of three ranks: {0, 2} trains one model, {1, 2} another one; and plain Keras.

All three ranks also train together and save. Ranks 0 and 2 go on from that file.
"""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from common import OUT, error_of, report
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


def by_file(pair, *, keras_optimizer):
    """Three ranks save, two load: by optimizer with another exchange, or by reducer."""
    file, process_sets = OUT / f"state-{keras_optimizer}.ef", (None, pair)
    saved, found = None, {}
    for process_set in process_sets if hvd.rank() != 1 else process_sets[:1]:
        model, plain_optimizer = build_model(), keras.optimizers.SGD(0.05)
        options = {} if process_set is None else {"process_set": pair, "exchange": "double_pass"}
        if keras_optimizer:
            optimizer = ef.DistributedOptimizer(plain_optimizer, compression=METHOD, **options)
            optimizer.build(model.trainable_variables)
            holder, average = optimizer, plain
        else:
            optimizer = plain_optimizer
            reducer = holder = ef.Reducer(model.trainable_variables, METHOD, **options)

            def average(tape, loss, variables, reducer=reducer):
                return reducer.reduce(tape.gradient(loss, variables))

        if process_set is not None:
            ef.load(file, holder)
        else:
            found["too early"] = error_of(lambda saver=holder: ef.save(file, saver))
        found["end"] = train(average, optimizer, model)
        if process_set is None:
            ef.save(file, holder)
            saved = holder.merged_state_dict()
    if hvd.rank() != 1:
        ef.load(file, holder)  # between two steps
        again = holder.merged_state_dict()
        found["step"] = again["step"]
        found["same"] = all(
            np.allclose(value, again["parameters"][name][key], rtol=1e-6, atol=1e-7)
            for name, fields in saved["parameters"].items()
            for key, value in fields.items()
        )
    return found


def main() -> None:
    first, second = hvd.ProcessSet([0, 2]), hvd.ProcessSet([1, 2])
    hvd.init(process_sets=[first, second])
    results = {"alone": train(plain, keras.optimizers.SGD(0.05), build_model())}
    for name, process_set in (("first", first), ("second", second)):
        results[f"optimizer {name}"] = by_optimizer(process_set)
        results[f"tape {name}"] = by_tape(process_set)
    results["file, optimizer"] = by_file(first, keras_optimizer=True)
    results["file, reducer"] = by_file(first, keras_optimizer=False)
    report(hvd.rank(), results)
    hvd.allreduce(tf.zeros(1), name="end")  # a rank that ends early shuts Horovod down for all


main()
