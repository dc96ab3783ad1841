"""Rank 1 does not come: the others have to end, by themselves and in time."""

from __future__ import annotations

import time

import horovod.tensorflow as hvd
import tensorflow as tf
from common import ARGUMENTS

import ef_horovod.tensorflow as ef

METHOD = ef.ErrorFeedback(ef.OneBit())


def by_reducer(variable):
    exchange = "double_pass" if "sliced" in ARGUMENTS else "auto"
    reducer = ef.Reducer([variable], METHOD, exchange=exchange)
    return lambda gradient: reducer.reduce([gradient])[0]


def by_stock(variable):
    adapter = ef.Compression(METHOD, [variable])

    def average(gradient):
        compressed, context = adapter.compress(gradient)
        return adapter.decompress(hvd.allreduce(compressed, name="one"), context)

    return average


def main() -> None:
    hvd.init()
    where = ARGUMENTS[0]
    variable = tf.Variable(tf.zeros((40, 60)))
    step = (by_stock if where == "stock" else by_reducer)(variable)
    if where != "eager":
        step = tf.function(step)
    for i in range(5):
        if hvd.rank() == 1 and i == (0 if where == "first step" else 3):
            time.sleep(100)
        begin = time.monotonic()
        try:
            step(tf.ones(variable.shape))
        finally:
            print(f"step {i} took {time.monotonic() - begin:.1f} s", flush=True)


main()
