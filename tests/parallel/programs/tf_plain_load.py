"""Loads what wrapped optimizers have saved in a process that knows nothing of this package."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import keras
import numpy as np
from common import ARGUMENTS, report
from tf_common import INPUTS, build_model, digest

SAVED = Path(ARGUMENTS[0])


def whole_model(name):
    """A `.keras` file, and a step of training with what it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = keras.models.load_model(SAVED / name / "0" / "model.keras")
    optimizer = model.optimizer
    facts = {
        "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "is_sgd": type(optimizer) is keras.optimizers.SGD,
        "passes": optimizer.gradient_accumulation_steps,
        "iterations": int(optimizer._iterations),
        "momentum": digest(optimizer.momentums),
    }
    before = digest(model.trainable_variables)
    zeros = np.zeros((32, INPUTS), np.float32)
    model.fit(zeros, np.arange(32) % 10, batch_size=16, verbose=0)
    facts["learns"] = digest(model.trainable_variables) != before
    return facts | {"warnings": messages(caught)}


def weights(name):
    """A `.weights.h5` file into a model that was compiled with a plain optimizer."""
    model = build_model(seed=9)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss="mse")
    model.optimizer.build(model.trainable_variables)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_weights(SAVED / name / "0" / "model.weights.h5")
    iterations = int(model.optimizer.iterations)
    return {"iterations": iterations, "warnings": messages(caught)}


def messages(caught):
    return [str(warning.message) for warning in caught]


def main() -> None:
    results = {
        "whole_model": whole_model("WholeModel-ef21"),
        "accumulating": whole_model("AccumulatingModel-ef21"),
        "weights": weights("Weights-ef21"),
    }
    results["imported"] = [name for name in sys.modules if name.startswith("ef_horovod")]
    report(0, results)


main()
