"""Several ranks on a node in TensorFlow: eager, in graphs, and by Horovod's tape."""

from __future__ import annotations

import hashlib

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from common import error_of, report

import ef_horovod.tensorflow as ef
from ef_horovod import simulate

SHAPES, STEPS, BAD = ((64, 128), (40, 60), (10,)), 5, 3
TOP = ef.TopK(ratio=0.1)
CASES = (
    ("eager", ef.ErrorFeedback(TOP), "hierarchical"),
    ("graph", ef.ErrorFeedback(TOP), "hierarchical"),
    ("graph", ef.EF21(ef.OneBit(), server_compressor=TOP), "hierarchical:double_pass"),
    ("graph", ef.ErrorFeedback(ef.RandomK(ratio=0.1)), "hierarchical"),
    ("tape", ef.ErrorFeedback(TOP), "hierarchical"),
)


def gradient(rank, step, shape):
    return np.random.default_rng((rank, step)).integers(-8, 9, shape).astype(np.float32)


def steps_of(kind, method, exchange):
    """STEPS steps with a NaN on the last rank in one of them; what became of the variables."""
    variables = [tf.Variable(tf.zeros(shape)) for shape in SHAPES]
    options = {"exchange": exchange, "seed": 3}
    if kind == "tape":
        source = ef.Compression(method, variables, **options)
    else:
        source = ef.Reducer(variables, method, bucket_bytes=35_000, **options)

    def step(given):
        if kind == "tape":
            with tf.GradientTape() as tape:
                total = sum(tf.reduce_sum(v * g) for v, g in zip(variables, given, strict=True))
            tape = hvd.DistributedGradientTape(tape, compression=source)
            averages = tape.gradient(total, variables)
        else:
            averages = source.reduce(given)
        for variable, average in zip(variables, averages, strict=True):
            bad = tf.math.reduce_any(tf.math.is_nan(average))
            variable.assign_sub(tf.where(bad, tf.zeros_like(average), average))

    run = step if kind == "eager" else tf.function(step)
    for number in range(STEPS):
        given = [gradient(hvd.rank(), number, shape) for shape in SHAPES]
        if number == BAD and hvd.rank() == hvd.size() - 1:
            given[0][5, 7] = np.nan
        run([tf.constant(one) for one in given])
    return source, variables


def simulated(method, exchange):
    """The first variable's bucket, without the bad step."""
    good = [number for number in range(STEPS) if number != BAD]
    return simulate(
        method, lambda rank, x, step: gradient(rank, good[step], SHAPES[0]),
        np.zeros(SHAPES[0], np.float32), workers=4, ranks_per_node=2, steps=len(good),
        step_size=1.0, seed=3, name="bucket.1", exchange=exchange,
    )  # fmt: skip


def main() -> None:
    hvd.init(process_sets="dynamic")
    found = {}
    for kind, method, exchange in CASES:
        source, variables = steps_of(kind, method, exchange)
        bits = b"".join(variable.numpy().tobytes() for variable in variables)
        fact = {
            "bits": hashlib.sha256(bits).hexdigest(),
            "skipped": [row.skipped for row in source.stats()],
            "exchanges": sorted({row.exchange for row in source.stats()}),
        }
        if kind == "graph" and hvd.size() == 4:
            fact["same"] = variables[0].numpy().tobytes() == simulated(method, exchange).x.tobytes()
        found[f"{kind} {method} {exchange}"] = fact
    refused = error_of(
        lambda: ef.Reducer(
            [tf.Variable(tf.zeros((64, 64)))], ef.ErrorFeedback(TOP), exchange="hierarchical",
            dense_steps=5,
        )
    )  # fmt: skip
    report(hvd.rank(), {"found": found, "refused": refused})


main()
