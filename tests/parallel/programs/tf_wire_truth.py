"""Bytes by the library's count and by the kernel's, for ways of reducing in TensorFlow."""

from __future__ import annotations

import horovod.tensorflow as hvd
import tensorflow as tf
from common import ARGUMENTS, report
from loopback import ELEMENTS, EXCHANGES, METHODS, compare_horovod

import ef_horovod.tensorflow as ef


def counts_of(name: str) -> dict[str, float]:
    variable = tf.Variable(tf.zeros(ELEMENTS))
    reducer = ef.Reducer(
        [variable],
        METHODS[name],
        dense=lambda path, variable: False,
        bucket_bytes=4 * ELEMENTS,
        exchange=EXCHANGES.get(name, "auto"),
        check_sync=False,
    )
    gradient = tf.random.stateless_normal([ELEMENTS], seed=[0, hvd.rank()])

    @tf.function
    def step() -> None:
        (average,) = reducer.reduce([gradient + 0.01 * variable])
        variable.assign_sub(0.1 * average)

    def train(steps: int) -> None:
        for _ in range(steps):
            step()

    return compare_horovod(hvd, train, reducer.stats)


hvd.init()
report(hvd.rank(), {name: counts_of(name) for name in ARGUMENTS})
