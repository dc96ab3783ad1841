"""CompressedUpdates on real ranks of TensorFlow and Keras.

Argument: "all", or "sample" for every option with one of the optimizers only.
"""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
import tf_keras
import tf_local_updates
from common import ARGUMENTS, OUT, error_of, report
from given_updates import CASES, SETTINGS, SHAPES, STEPS, gradients_of
from tf_common import build_model, build_tf_keras_model, data, digest, loss_of

import ef_horovod.tensorflow as ef

SIGNS = ef.ErrorFeedback(ef.OneBit())
NONE = ef.NoFeedback(ef.Identity())
EVERY_CASE = ARGUMENTS == ["all"]
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda: keras.optimizers.AdamW(0.003),
}


def updates(name="AdamW", method=SIGNS, **options):
    return ef.CompressedUpdates(OPTIMIZERS[name](), method, **options)


def batches(steps, size=16):
    inputs, labels = data(hvd.rank(), steps, size)
    return list(zip(inputs.reshape(steps, size, -1), labels.reshape(steps, size), strict=True))


def train(model, optimizer, pairs, *, spoiled=(), in_graph=True):
    """Steps; the last rank has a NaN in its gradients in the spoiled ones."""
    variables = model.trainable_variables
    scaled, unscaled = (
        getattr(optimizer, name, lambda same: same)
        for name in ("get_scaled_loss", "get_unscaled_gradients")  # of tf_keras' scaler
    )
    scaled = getattr(optimizer, "scale_loss", scaled)  # of Keras 3

    def step(inputs, labels, factor):
        with tf.GradientTape() as tape:
            loss = scaled(loss_of(labels, model(inputs)) * factor)
        gradients = unscaled(tape.gradient(loss, variables))
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    step = tf.function(step) if in_graph else step
    for i, (inputs, labels) in enumerate(pairs):
        bad = i in spoiled and hvd.rank() == hvd.size() - 1
        step(tf.constant(inputs), tf.constant(labels), tf.constant(np.nan if bad else 1.0))
    return model


def flat(model):
    return np.concatenate([np.ravel(v) for v in model.trainable_variables])


def without_compression():
    """Largest difference from SGD with momentum on averaged gradients."""
    pairs = batches(20)
    ends = [
        flat(train(build_model(), optimizer, pairs))
        for optimizer in (
            updates("SGD", NONE),
            ef.DistributedOptimizer(OPTIMIZERS["SGD"]()),
        )
    ]
    moved = np.abs(ends[0] - flat(build_model())).max()
    return {"off": float(np.abs(ends[0] - ends[1]).max()), "moved": float(moved)}


def compressed():
    """Ends and ratios of bytes: in graphs, eagerly, and with tf_keras."""
    pairs, facts = batches(10), {}
    plain, dense, small = {}, {"dense_steps": 5}, {"exchange": "gather", "bucket_bytes": 4096}
    cases = [(name, options) for name in OPTIMIZERS for options in (plain, dense, small)]
    if not EVERY_CASE:
        cases = [("SGD", plain), ("SGD", dense), ("AdamW", plain), ("AdamW", small)]
    for name, options in cases:
        optimizer = updates(name, **options)
        model = train(build_model(), optimizer, pairs)
        facts[f"{name} {options}"] = end_of(model, optimizer)
    optimizer = updates()
    facts["eager"] = end_of(train(build_model(), optimizer, pairs, in_graph=False), optimizer)
    optimizer = ef.CompressedUpdates(tf_keras.optimizers.AdamW(0.003), SIGNS)
    facts["tf_keras"] = end_of(train(build_tf_keras_model(), optimizer, pairs), optimizer)
    return facts


def end_of(model, optimizer):
    ratio = optimizer.stats()[-1].ratio
    return {"digest": digest(model.trainable_variables), "ratio": ratio}


def of_given_gradients():
    """The same gradients as in PyTorch: where they lead, and the bytes of each bucket."""
    facts = {}
    for name, local_steps in CASES:
        kind = getattr(keras.optimizers, name)
        variables = [keras.Variable(np.zeros(shape, np.float32), name="v") for shape in SHAPES]
        lr, settings = SETTINGS[name]["lr"], dict(SETTINGS[name])
        del settings["lr"]
        if "eps" in settings:
            settings["epsilon"] = settings.pop("eps")
        optimizer = ef.CompressedUpdates(kind(lr, **settings), SIGNS, local_steps=local_steps)
        for step in range(STEPS):
            optimizer.apply([tf.constant(g) for g in gradients_of(hvd.rank(), step)], variables)
        optimizer.exchange()
        facts[f"{name} {local_steps}"] = {
            "end": [float(x) for v in variables for x in np.ravel(v)],
            "bytes": [[row.name, row.bytes_out, row.bytes_in] for row in optimizer.stats()],
        }
    return facts


def spoiled():
    """Steps with a NaN are as if they had not been; all ranks skip them."""
    pairs, facts = batches(1), {}
    adam, old_adam = OPTIMIZERS["AdamW"], lambda: tf_keras.optimizers.AdamW(0.003)
    old_scaler = tf_keras.mixed_precision.LossScaleOptimizer
    fixed = lambda: old_scaler(old_adam(), dynamic=False, initial_scale=8.0)  # noqa: E731
    more = {"tf_keras fixed scale": fixed} if EVERY_CASE else {}
    for name, make in {
        "plain": adam,
        "double_pass": adam,
        "scaled": lambda: keras.optimizers.LossScaleOptimizer(adam()),
        "tf_keras": old_adam,
        "tf_keras scaled": lambda: old_scaler(old_adam()),
        **more,
    }.items():
        build = build_tf_keras_model if "tf_keras" in name else build_model
        exchange = "double_pass" if name == "double_pass" else "auto"
        optimizer, calm = (ef.CompressedUpdates(make(), SIGNS, exchange=exchange) for _ in range(2))
        model = train(build(), optimizer, pairs * 8, spoiled=(0, 5))
        scale = getattr(optimizer, "dynamic_scale", getattr(optimizer, "loss_scale", 1.0))
        facts[name] = {
            "skipped": optimizer.stats()[-1].skipped,
            "model": digest(model.trainable_variables),
            "calm": digest(train(build(), calm, pairs * 6).trainable_variables),
            "scale": float(scale),
        }
    return facts


def resumed():
    """From files of each rank: weights, the rank's own moments, and error-feedback state."""
    pairs, ends = batches(10), {}
    whole, optimizer = build_model(), updates()
    train(whole, optimizer, pairs[:4])
    saved = tf.train.Checkpoint(model=whole, optimizer=optimizer)
    file = saved.write(str(OUT / f"checkpoint{hvd.rank()}"))
    own = digest(v for v in optimizer.variables if len(v.shape))
    ends["whole"] = digest(train(whole, optimizer, pairs[4:]).trainable_variables)
    again, other = build_model(seed=9), updates()
    other.build(again.trainable_variables)
    tf.train.Checkpoint(model=again, optimizer=other).read(file).assert_consumed()
    ends["again"] = digest(train(again, other, pairs[4:]).trainable_variables)
    return ends | {"moments": own}


def fitted():
    """`fit` in two parts, with a callback that broadcasts at the beginning of each."""
    inputs, labels = data(hvd.rank(), 6)
    ends = {}
    for name, parts in (("one", (2,)), ("two", (1, 1))):
        model, optimizer = build_model(seed=hvd.rank()), updates()
        model.compile(optimizer, loss_of, jit_compile=False)
        for epochs in parts:
            history = model.fit(
                inputs, labels, batch_size=16, shuffle=False, epochs=epochs, verbose=0,
                callbacks=[ef.TrainingCallback()],
            )  # fmt: skip
        ends[name] = digest(model.trainable_variables)
    return ends | {"logs": sorted(history.history)}


def corners(local_steps=1):
    """Keras' accumulation, a constraint, a gradient of rows, and one that is missing on a rank."""
    start = np.random.default_rng(0).random((40, 50), np.float32)
    positive = keras.Variable(start, name="positive")
    positive.constraint = keras.constraints.NonNeg()
    table = keras.Variable(start, name="table")
    variables = [positive, table]
    optimizer = ef.CompressedUpdates(
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), SIGNS, dense=lambda *_: False,
        local_steps=local_steps,
    )  # fmt: skip
    for step in range(8):
        rows = tf.IndexedSlices(
            tf.constant(gradients_of(hvd.rank(), step)[0][:3, :50]),
            [1, 2, 30],
            tf.constant((40, 50)),
        )
        optimizer.apply([None if step == 3 and hvd.rank() else positive + 0.5, rows], variables)
    return {
        "digest": digest(variables),
        "least": float(np.min(positive)),
        "zeros": int(np.sum(np.asarray(positive) == 0)),
        "changed rows": np.flatnonzero((np.asarray(table) != start).any(1)).tolist(),
        "steps": optimizer.stats()[-1].steps,
    }


def refusals():
    pairs = batches(1)
    wrapped = updates()

    def fit(optimizer, **options):
        model = build_model()
        model.compile(optimizer, loss_of, **options)
        return error_of(lambda: model.fit(*pairs[0], batch_size=16, verbose=0))

    scaler = tf_keras.mixed_precision.LossScaleOptimizer
    other = updates() if hvd.rank() else ef.DistributedOptimizer(OPTIMIZERS["AdamW"](), SIGNS)
    scaled = scaler(ef.CompressedUpdates(tf_keras.optimizers.SGD(0.1), SIGNS))
    model = build_tf_keras_model()
    return {
        "momentum": error_of(lambda: updates(method=ef.MomentumCorrection(ef.OneBit()))),
        "adam": error_of(lambda: updates(method=ef.FrozenAdam(ef.OneBit()), dense_steps=3)),
        "server": error_of(lambda: updates(exchange="server")),
        "compressor": error_of(lambda: updates(method=ef.OneBit())),
        "twice": error_of(lambda: ef.CompressedUpdates(wrapped, SIGNS)),
        "average": error_of(
            lambda: ef.CompressedUpdates(keras.optimizers.SGD(0.1, use_ema=True), SIGNS)
        ),
        "jit": fit(updates(), jit_compile=True),
        "inside": fit(keras.optimizers.LossScaleOptimizer(updates()), jit_compile=False),
        "inside of tf_keras": error_of(lambda: train(model, scaled, pairs)),
        "seed": error_of(lambda: train(build_model(), updates(seed=hvd.rank()), pairs)),
        "beside": error_of(lambda: train(build_model(), other, pairs)),
    }


def main() -> None:
    hvd.init()
    scenarios = (
        without_compression, compressed, of_given_gradients, spoiled, resumed, fitted, corners,
        refusals,
    )  # fmt: skip
    results = {scenario.__name__: scenario() for scenario in scenarios}
    local = {scenario.__name__: scenario() for scenario in tf_local_updates.SCENARIOS}
    local["corners"] = corners(local_steps=2)
    report(hvd.rank(), results | {"local": local})
    hvd.allreduce(tf.zeros(1), name="end")  # a rank that ends early shuts Horovod down for all


main()
