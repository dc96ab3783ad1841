"""Runs the blocks of docs/training.md that train with Keras 3, on two ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from common import OUT, report

sys.path.insert(0, str(Path(__file__).parents[2]))

from pages import python_blocks, run_in_order

import ef_horovod.tensorflow as ef

METHOD = ef.EF21(ef.TopK(ratio=0.1))


def given(block: str) -> dict[str, Any]:
    """What a recipe takes as defined; its optimizer is wrapped unless it averages itself."""
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(hvd.rank())
    inputs = random.normal(size=(16, 40)).astype("float32")
    labels = random.integers(0, 30, size=16)
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(30)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer: Any = keras.optimizers.SGD(0.1)
    if not any(word in block for word in ("reducer.", "DistributedGradientTape", "hvd.Dist")):
        optimizer = ef.DistributedOptimizer(optimizer, compression=METHOD)
        model.compile(optimizer, loss, run_eagerly=True)
        model.fit(inputs, labels, verbose=0)
    with tf.GradientTape() as tape:
        value = loss(labels, model(inputs))
    return {
        "ef": ef, "hvd": hvd, "keras": keras, "np": np, "tf": tf, "method": METHOD,
        "model": model, "optimizer": optimizer, "loss": loss, "loss_of": loss,
        "inputs": inputs, "labels": labels, "limit": 1e-3,
        "gradients": tape.gradient(value, [v.value for v in model.trainable_variables]),
        "reducer": ef.Reducer(model.trainable_variables, METHOD),
    }  # fmt: skip


def main() -> None:
    hvd.init()
    os.chdir(OUT)
    page = "docs/training.md"
    recipes = python_blocks(page, start="## TensorFlow and Keras")
    names = run_in_order(recipes, page, given)
    before = [w.copy() for w in names["model"].get_weights()]
    names["train_step"](names["inputs"], names["labels"])
    moved = [
        bool((b != w).any()) for b, w in zip(before, names["model"].get_weights(), strict=True)
    ]
    report(hvd.rank(), {"recipes": len(recipes), "moved": moved})


main()
