"""Several ranks on a node in TensorFlow: eager, in graphs, and by Horovod's tape.

Arguments: "singles" for steps of many methods, or "few"; and "pretend" for nodes of two over MPI.
"""

from __future__ import annotations

import hashlib

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from common import ARGUMENTS, report
from pretended_nodes import pretend
from same_gradients import SEED, SHAPE, cases_by_nodes, dense_steps_of
from same_gradients import STEPS as MORE_STEPS
from same_gradients import digest as digest_of
from same_gradients import gradient as gradient_of

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
    ("graph", ef.EF21(TOP), "auto:64kbit,0us"),
    ("graph", ef.ErrorFeedback(TOP), "hierarchical", 2),
    ("graph", ef.EF21(ef.OneBit(), server_compressor=TOP), "hierarchical:double_pass", 2),
    ("eager", ef.MomentumCorrection(TOP), "hierarchical", 2),
)


def gradient(rank, step, shape):
    return np.random.default_rng((rank, step)).integers(-8, 9, shape).astype(np.float32)


def steps_of(kind, method, exchange, dense_steps=0):
    """STEPS steps with a NaN on the last rank in one of them; what became of the variables."""
    variables = [tf.Variable(tf.zeros(shape)) for shape in SHAPES]
    options = {"exchange": exchange, "seed": 3, "dense_steps": dense_steps}
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


def simulated(method, exchange, dense_steps=0):
    """The first variable's bucket, without the bad step."""
    good = [number for number in range(STEPS) if number != BAD]
    return simulate(
        method, lambda rank, x, step: gradient(rank, good[step], SHAPES[0]),
        np.zeros(SHAPES[0], np.float32), workers=4, ranks_per_node=2, steps=len(good),
        step_size=1.0, seed=3, name="bucket.1", dense_steps=dense_steps,
        exchange=exchange if exchange.startswith("hierarchical") else "hierarchical:gather",
    )  # fmt: skip


def every_method():
    """Steps of a variable by each method in a graph; where they lead."""
    ends = {}
    for method, exchange in cases_by_nodes("singles") if ARGUMENTS[0] == "singles" else ():
        x = tf.Variable(tf.zeros(SHAPE))
        reducer = ef.Reducer(
            [x], method, exchange=exchange, seed=SEED, dense_steps=dense_steps_of(method)
        )

        @tf.function
        def step(g, x=x, reducer=reducer):
            x.assign_sub(reducer.reduce([g])[0])

        for number in range(MORE_STEPS):
            step(tf.constant(gradient_of(hvd.rank(), number)))
        ends[f"{method} by {exchange}"] = digest_of(x.numpy())
    return ends


def main() -> None:
    if "pretend" in ARGUMENTS:
        pretend(hvd, 2)
    hvd.init(process_sets="dynamic")
    found = {}
    for kind, method, exchange, *dense in CASES:
        source, variables = steps_of(kind, method, exchange, *dense)
        bits = b"".join(variable.numpy().tobytes() for variable in variables)
        fact = {
            "bits": hashlib.sha256(bits).hexdigest(),
            "skipped": [row.skipped for row in source.stats()],
            "exchanges": sorted({row.exchange for row in source.stats()}),
        }
        if (kind == "graph" or dense) and hvd.size() == 4:
            end = simulated(method, exchange, *dense).x
            fact["same"] = variables[0].numpy().tobytes() == end.tobytes()
        found[" ".join(map(str, (kind, method, exchange, *dense)))] = fact
    report(hvd.rank(), {"found": found, "every_method": every_method()})


main()
