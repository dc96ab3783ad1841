"""Trains by an exchange that is not part of the package, and by `gather`, on the same batches."""

from __future__ import annotations

import importlib

import checksummed_exchange  # noqa: F401 - registers it
import numpy as np
from common import ARGUMENTS, report
from same_gradients import digest

import ef_horovod as ef

STEPS = 6
METHODS = {
    "top-k": ef.EF21(ef.TopK(0.1)),
    "threshold": ef.ErrorFeedback(ef.HardThreshold(0.5)),  # messages of any length
}


def main() -> None:
    (framework,) = ARGUMENTS
    train = {"torch": train_torch, "tensorflow": train_tensorflow}[framework]
    hvd = importlib.import_module(f"horovod.{framework}")
    hvd.init()
    found = {
        f"{name} by {exchange}": train(method, exchange)
        for name, method in METHODS.items()
        for exchange in ("checksummed", "gather")
    }
    report(hvd.rank(), found)


def train_torch(method: ef.Method, exchange: str) -> dict[str, object]:
    import horovod.torch as hvd
    import torch

    import ef_horovod.torch as ef

    torch.manual_seed(0)
    model = torch.nn.Linear(64, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ef.DistributedOptimizer(
        optimizer, model.named_parameters(), compression=method, exchange=exchange
    )
    x = torch.randn(STEPS, 8, 64, generator=torch.Generator().manual_seed(hvd.rank()))
    for batch in x:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    (row, *_) = [row for row in optimizer.stats() if row.exchange == exchange]
    return {"weights": digest(model.weight.detach().numpy()), "bytes": row.bytes_out}


def train_tensorflow(method: ef.Method, exchange: str) -> dict[str, object]:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    import ef_horovod.tensorflow as ef

    rng = np.random.default_rng(0)
    w = tf.Variable(rng.normal(size=(64, 32)).astype(np.float32))
    reducer = ef.Reducer([w], method, exchange=exchange)
    x = np.random.default_rng(hvd.rank() + 1).normal(size=(STEPS, 8, 64)).astype(np.float32)

    @tf.function
    def step(batch: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.matmul(batch, w)))
        (gradient,) = reducer.reduce(tape.gradient(loss, [w]))
        w.assign_sub(0.1 * gradient)

    for batch in x:
        step(tf.constant(batch))
    (row, *_) = [row for row in reducer.stats() if row.exchange == exchange]
    return {"weights": digest(w.numpy()), "bytes": row.bytes_out}


main()
