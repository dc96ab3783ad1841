"""Gradients with a NaN on one rank, with and without loss scaling; facts for the tests.

Argument: "all", or "sample" for one kind of bad numbers by each optimizer.
"""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
import tf_keras
from common import ARGUMENTS, report
from tf_common import CLASSES, INPUTS, build_model, data, digest, loss_of

import ef_horovod.tensorflow as ef

STEPS, SIZE, BAD = 6, 16, 2  # the step after this many is bad on rank 1
RANDOM = ef.ErrorFeedback(ef.RandomK(ratio=0.2))  # draws from the step: it must not count on
TOP = ef.EF21(ef.TopK(ratio=0.05), momentum=0.5)


def batches(*, bad=None):
    """STEPS batches, and before the one of number BAD perhaps one that `bad` is in, on rank 1."""
    inputs, labels = data(hvd.rank(), STEPS, SIZE)
    pairs = list(zip(inputs.reshape(STEPS, SIZE, -1), labels.reshape(STEPS, SIZE), strict=True))
    if bad is not None:
        spoilt = pairs[0][0].copy()
        spoilt[3, 5] = bad if hvd.rank() == 1 else spoilt[3, 5]
        pairs.insert(BAD, (spoilt, pairs[0][1]))
    return pairs


def flat(pairs):
    return tuple(np.concatenate(parts) for parts in zip(*pairs, strict=True))


def memories_of(holder) -> str:
    """Hash of a rank's error memories and of the step that they are at."""
    state = holder.compression_state_dict()
    parts = [value for fields in state["parameters"].values() for value in fields.values()]
    return digest([*parts, state["step"]])


def stepper(model, optimizer):
    """A step of a loop of one's own, as a graph."""
    variables = model.trainable_variables

    @tf.function
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(inputs, training=True))
            scaled = optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(scaled, variables), variables)

    return lambda pair: step(tf.constant(pair[0]), tf.constant(pair[1]))


def train(plain, method, *, bad=None):
    """A loop; the state before and after the bad step, and how it ends."""
    model, optimizer = build_model(), ef.DistributedOptimizer(plain, compression=method)
    step, facts = stepper(model, optimizer), {"scales": []}
    everything = lambda: [  # noqa: E731
        digest([*model.variables, *optimizer.variables]),
        memories_of(optimizer),
    ]
    for i, pair in enumerate(batches(bad=bad)):
        before = everything() if i == BAD else None
        step(pair)
        if before:
            facts["unchanged"] = everything() == before
        facts["scales"].append(float(getattr(optimizer, "dynamic_scale", 1.0)))
    ends = [digest(model.trainable_variables), memories_of(optimizer), int(optimizer.iterations)]
    return facts | {"ends": ends, "optimizer": optimizer, "model": model}


def facts_of(run):
    return {name: run[name] for name in ("ends", "scales", "unchanged") if name in run}


def keras_loop():
    """A NaN and an infinity: the same end as without that step."""
    results = {}
    for name, make, method, sampled in (
        ("sgd", lambda: keras.optimizers.SGD(0.05, momentum=0.9), TOP, np.inf),
        ("adam", lambda: keras.optimizers.Adam(0.01), RANDOM, np.nan),
    ):
        for bad in (None, sampled) if ARGUMENTS == ["sample"] else (None, np.nan, np.inf):
            results[f"{name} {bad}"] = facts_of(train(make(), method, bad=bad))
    return results


def keras_fit():
    """`model.fit` goes on after a bad batch."""
    return [fit(build_model(), keras, bad=bad)["end"] for bad in (None, np.nan)]


def tf_keras_fit():
    return [fit(tf_keras_model(), tf_keras, bad=bad)["end"] for bad in (None, np.nan)]


def fit(model, family, *, bad=None, optimizer=None, method=TOP):
    plain = family.optimizers.SGD(0.05, momentum=0.9) if optimizer is None else optimizer
    wrapped = ef.DistributedOptimizer(plain, compression=method)
    options = {"jit_compile": False} if family is keras else {}
    loss = family.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(wrapped, loss=loss, **options)
    inputs, labels = flat(batches(bad=bad))
    model.fit(inputs, labels, batch_size=SIZE, shuffle=False, verbose=0)
    end = [digest(model.trainable_variables), memories_of(wrapped), int(wrapped.iterations)]
    return {"end": end, "skipped": wrapped.stats()[-1].skipped}


def tf_keras_model():
    tf_keras.backend.clear_session()
    layers = [
        tf_keras.Input((INPUTS,)),
        tf_keras.layers.Dense(60, activation="tanh"),
        tf_keras.layers.Dense(CLASSES, dtype="float32"),
    ]
    model, generator = tf_keras.Sequential(layers), np.random.default_rng(3)
    for variable in model.weights:  # equal on all ranks
        variable.assign(0.1 * generator.standard_normal(variable.shape))
    return model


def tape():
    """A tape returns NaNs on all ranks and keeps its memories."""
    model = build_model()
    variables = model.trainable_variables
    reducer = ef.Reducer(variables, RANDOM)
    for i, (inputs, labels) in enumerate(batches(bad=np.nan)[: BAD + 1]):
        before = memories_of(reducer) if i == BAD else None
        with tf.GradientTape() as recorded:
            loss = loss_of(labels, model(inputs, training=True))
        distributed = ef.DistributedGradientTape(recorded, compression=reducer)
        gradients = distributed.gradient(loss, variables)
        finite = [bool(np.isfinite(g).all()) for g in gradients]
        nan = [bool(np.isnan(g).all()) for g in gradients]
        if i < BAD:
            assert all(finite), finite
    return {"all_nan": all(nan), "unchanged": memories_of(reducer) == before}


def stock():
    """In Horovod's own tape the variable with the NaN alone keeps its memory."""
    shapes = {"bad": (40, 40), "good": (50, 40)}
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in shapes.items()]
    compression = ef.Compression(ef.ErrorFeedback(ef.TopK(ratio=0.1)), variables)

    def step(i, factor):
        generator = np.random.default_rng([hvd.rank(), i])
        weights = [generator.standard_normal(shape, np.float32) for shape in shapes.values()]
        weights[0][2, 3] *= factor
        with tf.GradientTape() as recorded:
            products = [tf.reduce_sum(v * w) for v, w in zip(variables, weights, strict=True)]
            loss = tf.add_n(products)
        distributed = hvd.DistributedGradientTape(recorded, compression=compression)
        return distributed.gradient(loss, variables)

    errors = lambda: [  # noqa: E731
        digest([fields["worker.error"]])
        for fields in compression.state_dict()["parameters"].values()
    ]
    step(0, 1.0)
    before = errors()
    bad, good = step(1, np.nan if hvd.rank() == 1 else 1.0)
    after = errors()
    return {
        "kept": [a == b for a, b in zip(after, before, strict=True)],
        "nan": [bool(np.isnan(bad).all()), bool(np.isnan(good).any())],
        "skipped": [row.skipped for row in compression.stats()],
        "next_finite": all(bool(np.isfinite(g).all()) for g in step(2, 1.0)),
    }


def scaler(**options):
    inner = keras.optimizers.SGD(0.05, momentum=0.9)
    return keras.optimizers.LossScaleOptimizer(inner, **options)


def loss_scaling():
    """Scales that are powers of two change no bit, of parameters or of memories."""
    growing = {"initial_scale": 2.0**10, "dynamic_growth_steps": 3}
    plain = keras.optimizers.SGD
    runs = {
        "none": train(plain(0.05, momentum=0.9), TOP),
        "constant": train(plain(0.05, momentum=0.9, loss_scale_factor=1024.0), TOP),
        "dynamic": train(scaler(**growing), TOP),
        "overflow": train(scaler(**growing), TOP, bad=np.inf),
    }
    return {name: facts_of(run) for name, run in runs.items()}


def mixed_float16():
    """Real 16-bit gradients: memories are those of float32 training, about."""
    exact = train(keras.optimizers.SGD(0.05, momentum=0.9), RANDOM)
    facts = {}
    for name, scale in (("small", 2.0**6), ("large", 2.0**12)):
        with policy("mixed_float16"):
            options = {"initial_scale": scale, "dynamic_growth_steps": 100}
            run = train(scaler(**options), RANDOM, bad=np.nan)
            assert run["model"].layers[0].compute_dtype == "float16"
        facts[name] = facts_of(run) | {"error": memory_distance(run, exact)}
    return facts


def memory_distance(run, other):
    """How far error memories are from another run's, relative to their norm."""
    first, second = (
        np.concatenate(
            [
                fields["worker.error"]
                for fields in r["optimizer"].compression_state_dict()["parameters"].values()
                if "worker.error" in fields
            ]
        )
        for r in (run, other)
    )
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


class policy:
    """Keras' and tf_keras' global policy for a while."""

    def __init__(self, name: str, family=keras) -> None:
        self.name = name
        mixed = tf_keras.mixed_precision
        self.put = mixed.set_global_policy if family is tf_keras else keras.config.set_dtype_policy

    def __enter__(self) -> None:
        self.put(self.name)

    def __exit__(self, *_: object) -> None:
        self.put("float32")


def half_precision():
    """Policies without a loss scale, the second with variables of 16 bits too."""
    facts = {}
    for name in ("mixed_bfloat16", "bfloat16"):
        with policy(name):
            run = train(keras.optimizers.SGD(0.05, momentum=0.9), TOP, bad=np.nan)
        dtype = run["model"].trainable_variables[0].dtype
        facts[name] = facts_of(run) | {"dtype": dtype}
    return facts


def tf_keras_scalers():
    """tf_keras' loss scaler, made by `compile` around the wrapped optimizer, or by hand inside."""
    facts = {}
    for where in ("outside", "inside"):
        for bad in (None, np.nan):
            with policy("mixed_float16", tf_keras):
                facts[f"{where} {bad}"] = scaled_fit(where, bad)
    return facts


def scaled_fit(where, bad):
    model, plain = tf_keras_model(), tf_keras.optimizers.SGD(0.05, momentum=0.9)
    kind = tf_keras.mixed_precision.LossScaleOptimizer
    inside = kind(plain, initial_scale=2.0**15) if where == "inside" else plain
    facts = fit(model, tf_keras, bad=bad, optimizer=inside)
    assert isinstance(model.optimizer, kind), type(model.optimizer)
    assert model.layers[0].compute_dtype == "float16"
    return facts | {"scale": float(model.optimizer.loss_scale)}


def main() -> None:
    hvd.init()
    scenarios = (
        keras_loop, keras_fit, tf_keras_fit, tape, stock, loss_scaling, mixed_float16,
        half_precision, tf_keras_scalers,
    )  # fmt: skip
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})
    hvd.allreduce(tf.zeros(1), name="end")  # a rank that ends early shuts Horovod down for all


main()
