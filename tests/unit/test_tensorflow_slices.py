"""The double pass as ops: the bits of NumPy, eager or in a graph."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import ef_horovod as ef
from ef_horovod.exchange.channel import finish_step
from ef_horovod.tensorflow.buckets import Bucket, receive
from ef_horovod.testing.echo import EchoTransport
from ef_horovod.testing.echo_tensorflow import EchoOps
from ef_horovod.testing.frameworks import OneChannel
from ef_horovod.training.buckets import BucketPlan, one_slot
from ef_horovod.training.state import read_state

RANKS, SHAPES, STEPS = 3, ((48, 32), (24, 32)), 8  # slices of equal length: all ranks say the same
NAMES = ("bucket.0", "bucket.1")
METHODS = [
    ef.DoubleSqueeze(ef.TopK(ratio=0.1), server_compressor=ef.TopK(ratio=0.2)),
    ef.EF21(ef.TopK(ratio=0.1), momentum=0.3),
    ef.EF21(ef.Cast("float16"), server_compressor=ef.TopK(ratio=0.1)),
    ef.NoFeedback(ef.Identity()),
    ef.ErrorFeedback(ef.HardThreshold(0.5)),
]


def plans_of(method):
    return [
        BucketPlan(name, one_slot(name, tf.Variable(tf.zeros(shape))), method)
        for name, shape in zip(NAMES, SHAPES, strict=True)
    ]


def gradients(step):
    rng = np.random.default_rng(step)
    return [rng.standard_normal(shape, np.float32) for shape in SHAPES]


def facts_of(bucket, directions):
    held = read_state([OneChannel(bucket.channel, bucket.slots)])
    return [
        [np.asarray(direction).tobytes() for direction in directions],
        {key: np.asarray(value).tobytes() for of in held.values() for key, value in of.items()},
    ]


def in_numpy(method, bad=None):
    opened = [
        plan.open(np.zeros(plan.length, np.float32), EchoTransport(RANKS), exchange="double_pass")
        for plan in plans_of(method)
    ]
    directions = []
    for step in range(STEPS):
        if step == bad:
            continue
        for channel, gradient in zip(opened, gradients(step), strict=True):
            channel.gradient[:] = gradient.reshape(-1)
            channel.start(step)
        directions.append([direction.copy() for direction in finish_step(opened)])
    slots = [plan.slots for plan in plans_of(method)]
    pairs = zip(opened, slots, zip(*directions, strict=True), strict=True)
    return [facts_of(OneChannel(channel, its), parts) for channel, its, parts in pairs]


def by_ops(method, wrap, bad=None):
    ops = EchoOps(RANKS)
    opened = [Bucket(plan, ops, exchange="double_pass", seed=0) for plan in plans_of(method)]
    one = tf.constant(1.0)

    @wrap
    def reduce(step, *given):
        arrived = [b.send(step, one, [g]) for b, g in zip(opened, given, strict=True)]
        return receive(opened, arrived, step, one, tf.constant(True))

    directions = []
    for step in range(STEPS):
        given = gradients(step)
        if step == bad:
            given[1][7, 7] = np.nan
        parts, good, following = reduce(tf.constant(step, tf.int64), *map(tf.constant, given))
        assert bool(good) == (step != bad)
        assert int(following) == step + bool(good)
        if step == bad:
            assert all(np.isnan(part).all() for part in parts)
        else:
            directions.append(parts)
    pairs = zip(opened, zip(*directions, strict=True), strict=True)
    return [facts_of(bucket, parts) for bucket, parts in pairs]


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "tf.function"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_directions_and_memories_are_numpy_s(method, wrap):
    assert by_ops(method, wrap) == in_numpy(method)


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "tf.function"])
def test_a_step_with_a_nan_in_one_bucket_leaves_no_trace_in_any(wrap):
    assert by_ops(METHODS[0], wrap, bad=3) == in_numpy(METHODS[0], bad=3)
