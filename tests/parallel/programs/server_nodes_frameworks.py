"""PyTorch and TensorFlow with a server that hears one worker per node; the two are on one node.

A job for each framework, one after the other.
"""

from __future__ import annotations

import keras  # TensorFlow comes before MPI
import numpy as np
import tensorflow as tf
import torch
from common import report
from meeting import meet
from server_nodes_gradients import BAD, METHODS, SHAPES, STEPS, gradient

import ef_horovod.tensorflow as ef_tensorflow
import ef_horovod.torch as ef_torch

torch.set_num_threads(1)


def by_torch():
    x = torch.nn.Parameter(torch.zeros(SHAPES["w"]))
    optimizer = ef_torch.DistributedOptimizer(
        torch.optim.SGD([x], lr=1.0), [("x", x)], compression=METHODS[0],
        exchange="hierarchical:server", seed=3,
    )  # fmt: skip

    def step(given):
        optimizer.zero_grad()
        (x * torch.from_numpy(given)).sum().backward()
        optimizer.step()

    return optimizer, lambda: x.detach().numpy(), step


def by_tensorflow():
    x = tf.Variable(tf.zeros(SHAPES["w"]))
    optimizer = ef_tensorflow.DistributedOptimizer(
        keras.optimizers.SGD(1.0), METHODS[0], exchange="hierarchical:server", seed=3
    )
    optimizer.build([x])
    step = tf.function(lambda g: optimizer.apply([g], [x]))
    return optimizer, x.numpy, lambda given: step(tf.constant(given))


def main():
    found = {}
    meet()
    for build in (by_torch, by_tensorflow):
        optimizer, values, step = build()
        rank = optimizer.transport.rank
        for number in range(STEPS):
            given = gradient(rank, number, "w")
            if number == BAD and rank == 1:
                given[5, 7] = np.nan  # of one slice
            step(given)
        row = optimizer.stats()[0]
        optimizer.transport.close()
        facts = {"skipped": row.skipped, "exchange": row.exchange, "out": row.bytes_out}
        found[build.__name__] = {"end": values().tobytes().hex(), **facts}
    report(rank, found)


main()
