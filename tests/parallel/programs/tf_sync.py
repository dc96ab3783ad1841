"""Ranks that train apart, and what keeps them together; facts for the tests to judge."""

from __future__ import annotations

import warnings
from pathlib import Path

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
import tf_keras
from common import OUT, error_of, report
from tf_common import build_model, build_tf_keras_model, data, digest, loss_of

import ef_horovod.tensorflow as ef

METHOD = ef.EF21(ef.TopK(ratio=0.05))


def sgd(**options):
    return ef.DistributedOptimizer(keras.optimizers.SGD(0.1), METHOD, **options)


def fit(model, optimizer, *callbacks, batches=4, inputs=None, **options):
    """Train on this rank's batches in their order; the history."""
    model.compile(optimizer, loss_of, metrics=["accuracy"])
    own, labels = data(hvd.rank(), batches)
    return model.fit(
        own if inputs is None else inputs, labels, batch_size=16, verbose=0, shuffle=False,
        callbacks=list(callbacks), **options,
    ).history  # fmt: skip


def ends(model):
    return digest(model.trainable_variables)


def of_both_families(wrap, *, seed=0):
    """(a model, an optimizer) of Keras 3 and of tf_keras."""
    return {
        "keras": (build_model(seed), wrap(keras.optimizers.SGD(0.1))),
        "tf_keras": (build_tf_keras_model(seed), wrap(tf_keras.optimizers.SGD(0.1))),
    }


def not_wrapped():
    """A plain optimizer under the callback: starts are equal, and part with the first step."""
    pairs = of_both_families(lambda optimizer: optimizer)
    return {
        family: error_of(lambda m=model, o=optimizer: fit(m, o, ef.TrainingCallback()))
        for family, (model, optimizer) in pairs.items()
    }


def not_broadcast():
    """A wrapped optimizer, and other first values on each rank."""
    pairs = of_both_families(
        lambda optimizer: ef.DistributedOptimizer(optimizer, METHOD), seed=hvd.rank()
    )
    return {
        family: error_of(lambda m=model, o=optimizer: fit(m, o))
        for family, (model, optimizer) in pairs.items()
    } | {
        "tape": error_of(lambda: loop(build_model(hvd.rank()), tf.function)),
        "eager tape": error_of(lambda: loop(build_model(hvd.rank()), lambda step: step)),
    }


def loop(model, wrap, after_first=lambda: None, steps=4):
    """A loop with a distributed tape; something is done after the first batch."""
    variables, optimizer = model.trainable_variables, keras.optimizers.SGD(0.1)
    optimizer.build(variables)
    reducer = ef.Reducer(variables, METHOD)

    @wrap
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(inputs))
        tape = ef.DistributedGradientTape(tape, compression=reducer)
        optimizer.apply(tape.gradient(loss, variables), variables)

    inputs, labels = data(hvd.rank(), steps)
    for i in range(steps):
        step(tf.constant(inputs[16 * i :][:16]), tf.constant(labels[16 * i :][:16]))
        if i == 0:
            after_first()


def broadcast_after_the_first_batch():
    """As in Horovod's examples, for variables that exist only then."""
    model = build_model(hvd.rank())
    before = ends(model)
    loop(model, tf.function, lambda: ef.broadcast_variables(model.variables))
    return {"before": before, "end": ends(model)}


def without_the_check():
    """Nothing is said, and ranks are apart."""
    apart, plain = build_model(hvd.rank()), build_model()
    errors = [
        error_of(lambda: fit(apart, sgd(check_sync=False))),
        error_of(
            lambda: fit(plain, keras.optimizers.SGD(0.1), ef.TrainingCallback(check_sync=False))
        ),
    ]
    return {"errors": errors, "ends": [ends(apart), ends(plain)]}


def require_in_sync():
    same, apart = build_model(), build_model(hvd.rank())
    tiny = tf.Variable([0.0, -0.0 if hvd.rank() else 0.0])
    return {
        "same": error_of(lambda: ef.require_in_sync(same.variables)),
        "apart": error_of(lambda: ef.require_in_sync(apart.variables)),
        "sign of a zero": error_of(lambda: ef.require_in_sync([tiny])),
    }


def random_model():
    """Layers with statistics and with random numbers; other ones on each rank."""
    keras.utils.set_random_seed(hvd.rank())
    return keras.Sequential(
        [
            keras.Input((40,)),
            keras.layers.Dense(60),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2, seed=100 + hvd.rank()),
            keras.layers.Dense(10),
        ]
    )


class Seen(keras.callbacks.Callback):
    """What callbacks after it, or before it, were given."""

    def __init__(self):
        super().__init__()
        self.start, self.logs = {}, []

    def on_train_begin(self, logs=None):
        model = self.model
        self.start = {
            "weights": digest(model.weights),
            "optimizer": digest(model.optimizer.variables),
            "seed": np.asarray(model.layers[2].seed_generator.state).tolist(),
        }

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


def callback():
    """Starts differ, for weights, statistics and momentum; rank 1's are taken."""
    model = random_model()
    model.layers[1].moving_mean.assign(tf.fill(60, float(hvd.rank())))
    optimizer = ef.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), METHOD)
    optimizer.build(model.trainable_variables)
    optimizer.momentums[0].assign(tf.fill(optimizer.momentums[0].shape, 1.0 + hvd.rank()))
    before = {"weights": digest(model.weights), "optimizer": digest(optimizer.variables)}
    alone, seen = Seen(), Seen()
    history = fit(model, optimizer, alone, ef.TrainingCallback(1), seen, epochs=2)
    return {
        "before": before,
        "start": seen.start,
        "end": ends(model),
        "alone": alone.logs,
        "averaged": seen.logs,
        "history": history,
        "sent": optimizer.stats()[-1].bytes_out,
    }


def metrics_left_alone():
    model, alone = build_model(), []
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda _, logs: alone.append(dict(logs)))
    history = fit(model, sgd(), keep, ef.TrainingCallback(average_metrics=False))
    return {"alone": alone[0]["loss"], "history": history["loss"][0]}


def metrics_that_differ():
    """Only one rank validates: a warning, and no wait for a mean that never comes."""
    options = {"validation_data": data(5, 1)} if hvd.rank() == 0 else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(build_model(), sgd(), ef.TrainingCallback(), **options)
    return [str(w.message) for w in caught if "not averaged" in str(w.message)]


def skipped_steps():
    """A NaN in one of four batches, on one rank, in each of two epochs."""
    inputs = data(hvd.rank(), 4)[0]
    if hvd.rank() == 1:
        inputs[40, 3] = np.nan
    model = build_model()
    optimizer, callback = sgd(), ef.TrainingCallback(log=OUT / "fit.jsonl", log_every=3)
    history = fit(model, optimizer, callback, inputs=inputs, epochs=2)
    total = optimizer.stats()[-1]
    logged = {"bytes": [total.bytes_out, total.bytes_in], "reducer": reducer_log()}
    return {
        "log": logged,
        "skipped": history["ef_skipped"],
        "bytes": history["ef_bytes"],
        "end": ends(model),
    }


def reducer_log():
    """The log of a reducer in a `tf.function`, with TensorBoard."""
    model = build_model()
    reducer = ef.Reducer(model.trainable_variables, METHOD)
    log = ef.TrainingLog(OUT / "loop.jsonl", reducer, every=1, tensorboard=OUT / "log_events")

    @tf.function
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(inputs))
        reducer.reduce(tape.gradient(loss, model.trainable_variables))
        return loss

    inputs, labels = map(tf.constant, data(hvd.rank(), 1))
    losses = [step(inputs, labels) for _ in range(3)]
    for loss in losses[2:]:  # one call only: the number is that of the steps
        log.step(loss)
    shown = scalars(OUT / "log_events", "ef/") if hvd.rank() == 0 else {}
    return {"bytes": reducer.stats()[-1].bytes_out, "loss": float(losses[-1]), "shown": shown}


def tensorboard():
    """What event files say, which is all that some people look at."""
    directory = OUT / f"events{hvd.rank()}"
    history = fit(
        build_model(), sgd(), ef.TrainingCallback(), keras.callbacks.TensorBoard(directory),
        epochs=2,
    )  # fmt: skip
    return {"history": history, "events": scalars(directory / "train")}


def scalars(directory: Path, prefix="epoch_ef_"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {
        tag: [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if tag.startswith(prefix)
    }


def tf_keras_callback():
    model = build_tf_keras_model(seed=hvd.rank())
    optimizer = ef.DistributedOptimizer(tf_keras.optimizers.SGD(0.1, momentum=0.9), METHOD)
    history = fit(model, optimizer, ef.TrainingCallback(), epochs=2)
    return {"history": history, "end": ends(model)}


def main() -> None:
    hvd.init()
    scenarios = (
        not_wrapped, not_broadcast, broadcast_after_the_first_batch, without_the_check,
        require_in_sync, callback, metrics_left_alone, metrics_that_differ, skipped_steps,
        tensorboard, tf_keras_callback,
    )  # fmt: skip
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
