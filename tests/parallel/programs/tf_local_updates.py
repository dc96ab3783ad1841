"""Scenarios of tf_updates.py with several local steps per exchange."""

from __future__ import annotations

import copy

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
import tf_keras
from common import OUT, error_of
from given_updates import SHAPES, gradients_of
from tf_common import build_model, build_tf_keras_model, data, digest, loss_of

import ef_horovod.tensorflow as ef

SIGNS = ef.ErrorFeedback(ef.OneBit(), decay=0.95)
EVERY = 3


def updates(method=SIGNS, *, inner=None, **options):
    inner = inner or keras.optimizers.AdamW(0.003)
    return ef.CompressedUpdates(inner, method, **{"local_steps": EVERY, **options})


class Run:
    """Variables and an optimizer, whose steps have given gradients."""

    def __init__(self, optimizer, *, in_graph=False, old=False):
        zeros = [np.zeros(shape, np.float32) for shape in SHAPES]
        make = tf.Variable if old else keras.Variable
        self.variables = [make(array, name="v") for array in zeros]
        self.optimizer, self.taken = optimizer, 0
        self._apply = tf.function(self._now) if in_graph else self._now

    def _now(self, *gradients):
        if hasattr(self.optimizer, "get_scaled_loss"):  # of tf_keras' scaler, which warns without
            self.optimizer.get_scaled_loss(tf.constant(0.0))
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        self.optimizer.apply_gradients(list(zip(gradients, self.variables, strict=True)))

    def step(self, *, spoiled=False):
        """Returns the digest of the variables after it."""
        gradients = gradients_of(hvd.rank(), self.taken)
        if spoiled and hvd.rank() == hvd.size() - 1:
            gradients[0][0, 0] = np.nan
        self._apply(*map(tf.constant, gradients))
        self.taken += 1
        return self.digest()

    def exchange(self):
        self.optimizer.exchange()
        return self.digest()

    def digest(self):
        return digest(self.variables)

    def counts(self):
        total, (driver,) = self.optimizer.stats()[-1], self.optimizer.drivers
        return {
            "steps": total.steps, "taken": driver.steps_taken(), "skipped": total.skipped,
            "wire": total.bytes_out, "dense": total.dense_bytes_out,
        }  # fmt: skip


def means():
    """Without compression, variables after an exchange are the mean of the workers' own ones."""
    none = ef.NoFeedback(ef.Identity())
    run = Run(updates(none, inner=keras.optimizers.SGD(0.05, momentum=0.9)), in_graph=True)
    alone = Run(keras.optimizers.SGD(0.05, momentum=0.9))
    digests = []
    for _ in range(EVERY):
        digests.append(run.step())
        alone.step()
    pairs = zip(run.variables, alone.variables, strict=True)
    off = [np.asarray(a) - hvd.allreduce(tf.convert_to_tensor(b)) for a, b in pairs]
    return {"off": max(float(np.abs(x).max()) for x in off), "digests": digests}


def compressed():
    """Over exchanges, with a last one before it is due; bytes and counts."""
    facts = {}
    for name, options in {
        "graph": {"exchange": "gather", "in_graph": True},
        "double_pass": {"exchange": "double_pass"},
        "tf_keras": {"inner": tf_keras.optimizers.AdamW(0.003), "old": True},
    }.items():
        made = {key: options.pop(key) for key in ("in_graph", "old") if key in options}
        run = Run(updates(**options), **made)
        for _ in range(2 * EVERY + 1):
            before = run.step()
        ends = {"before": before, "end": run.exchange(), "again": run.exchange()}
        facts[name] = ends | run.counts()
    return facts


def spoiled():
    """A NaN leaves out a step on its rank alone; one in a change drops the exchange on all."""
    run, facts = Run(updates(), in_graph=True), {}
    digests = [run.step(spoiled=i == 1) for i in range(EVERY)]
    facts["stood"] = digests[0] == digests[1]
    facts["good"] = digests[-1]
    for _ in range(EVERY - 1):
        run.step()
    if hvd.rank() == hvd.size() - 1:
        run.variables[1].assign(np.full(SHAPES[1], np.inf, np.float32))
    return facts | {"back": run.exchange()} | run.counts()


def scaled():
    """An overflow lowers the loss scale on its rank alone."""
    facts, old = {}, tf_keras.mixed_precision.LossScaleOptimizer
    for name, inner in {
        "keras": keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(0.003)),
        "tf_keras": old(tf_keras.optimizers.AdamW(0.003)),
    }.items():
        run = Run(updates(inner=inner), old=name == "tf_keras")
        for i in range(EVERY):
            run.step(spoiled=i == 1)
        scale = getattr(run.optimizer, "dynamic_scale", getattr(run.optimizer, "loss_scale", None))
        facts[name] = {"end": run.digest(), "scale": float(scale)}
    return facts


def resumed():
    """From a checkpoint and from state dicts between two exchanges, to the last bit."""
    run = Run(updates(), in_graph=True)
    for _ in range(EVERY + 2):
        run.step()
    names = {f"v{i}": variable for i, variable in enumerate(run.variables)}
    saved = tf.train.Checkpoint(optimizer=run.optimizer, **names)
    file = saved.write(str(OUT / f"between{hvd.rank()}"))
    state = copy.deepcopy(run.optimizer.compression_state_dict())
    values = [np.asarray(variable) for variable in run.variables]
    facts = {"next": run.step(), "whole": [run.step() for _ in range(EVERY)][-1]}

    again = Run(updates(), in_graph=True)
    again.optimizer.build(again.variables)
    names = {f"v{i}": variable for i, variable in enumerate(again.variables)}
    tf.train.Checkpoint(optimizer=again.optimizer, **names).read(file).assert_consumed()
    again.taken = EVERY + 2
    facts["again"] = [again.step() for _ in range(EVERY + 1)][-1]

    other = Run(updates())
    other.optimizer.build(other.variables)
    other.optimizer.load_compression_state_dict(state)
    for variable, value in zip(other.variables, values, strict=True):
        variable.assign(value)
    facts["exchanged"] = other.exchange()  # before the first step
    ef.save(OUT / "merged", other.optimizer)
    third = Run(updates(local_steps=1))
    third.optimizer.build(third.variables)
    ef.load(OUT / "merged", third.optimizer)
    third.step()
    one_more = Run(updates(local_steps=1))
    one_more.optimizer.build(one_more.variables)
    one_more.optimizer.load_compression_state_dict(state)
    counts = [one.counts()["taken"] for one in (run, again, other, third)]
    return facts | {"counts": counts, "one": error_of(one_more.step)}


class Watching(keras.callbacks.Callback):
    """Digests of the weights where a user looks at them; tf_keras takes it too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def look(self, *_):
        self.seen.append(digest(self.model.trainable_variables))

    on_train_begin = on_test_begin = on_epoch_end = look

    def __getattr__(self, name):  # hooks of tf_keras alone
        if name.startswith("_implements"):
            return lambda: False
        raise AttributeError(name)


def fitted():
    """`fit` on epochs of other lengths than an exchange, and again after a step without `fit`.

    In tf_keras, rank 0 alone makes that step.
    """
    inputs, labels = data(hvd.rank(), EVERY + 1)
    facts = {}
    for name, build, kind in (
        ("keras", build_model, keras.optimizers.AdamW),
        ("tf_keras", build_tf_keras_model, tf_keras.optimizers.AdamW),
    ):
        model, optimizer = build(seed=hvd.rank()), updates(inner=kind(0.003))
        model.compile(optimizer, loss_of, jit_compile=False)
        watching, losses = Watching(), []
        for epochs in (2, 1):
            history = model.fit(
                inputs, labels, batch_size=16, shuffle=False, epochs=epochs, verbose=0,
                validation_data=data(7, 1), callbacks=[ef.TrainingCallback(), watching],
            )  # fmt: skip
            losses += history.history["val_loss"]
            if epochs == 2 and (name == "keras" or hvd.rank() == 0):
                pairs = [(v * (1.0 + hvd.rank()), v) for v in model.trainable_variables]
                optimizer.apply_gradients(pairs)
        steps = optimizer.stats()[-1].steps
        facts[name] = {"seen": watching.seen, "losses": losses, "steps": steps}
    return facts


def refusals():
    run = Run(updates())
    run.step()
    some = [tf.constant(gradients_of(hvd.rank(), 0)[0])]
    return {
        "save": error_of(lambda: ef.save(OUT / "nothing", run.optimizer)),
        "set": error_of(lambda: run.optimizer.apply(some, run.variables[:1])),
        "graph": error_of(tf.function(run.optimizer.exchange)),
        "steps": error_of(lambda: updates(local_steps=0)),
        "unlike": error_of(Run(updates(local_steps=2 + hvd.rank())).step),
    }


SCENARIOS = (means, compressed, spoiled, scaled, resumed, fitted, refusals)
