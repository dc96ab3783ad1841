"""`exchange="auto:NETWORK"` in TensorFlow, beside what it should stand for."""

from __future__ import annotations

import warnings

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from common import report
from tf_common import build_model, data, digest, loss_of

import ef_horovod.tensorflow as ef

SIGNS = ef.OneBit()
METHOD, DENSE = ef.DoubleSqueeze(SIGNS, server_compressor=SIGNS), ef.NoFeedback(ef.Identity())
WAYS = {"auto:64kbit": (METHOD, "double_pass"), "auto:400gbit,0us": (DENSE, "dense")}


def run(method, exchange):
    """Digest and norm after some steps in a graph, and how the buckets of matrices travelled."""
    model, plain = build_model(0), keras.optimizers.SGD(0.05)
    variables = model.trainable_variables
    plain.build(variables)
    reducer = ef.Reducer(variables, method, exchange=exchange, bucket_bytes=8000)

    @tf.function
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(inputs))
        tape = ef.DistributedGradientTape(tape, compression=reducer)
        plain.apply(tape.gradient(loss, variables), variables)

    inputs, labels = data(hvd.rank(), 4, 16)
    for t in range(4):
        step(tf.constant(inputs.reshape(4, 16, -1)[t]), tf.constant(labels.reshape(4, 16)[t]))
    ways = {row.exchange for row in reducer.stats() if row.num_elements > 1000 and row.exchange}
    norm = float(tf.linalg.global_norm([tf.convert_to_tensor(v) for v in variables]))
    return {"digest": digest(variables), "norm": norm, "ways": sorted(ways)}


def main():
    hvd.init()
    warnings.simplefilter("ignore")
    report(
        hvd.rank(),
        {
            exchange: {"auto": run(METHOD, exchange), "named": run(method, kind)}
            for exchange, (method, kind) in WAYS.items()
        },
    )


main()
