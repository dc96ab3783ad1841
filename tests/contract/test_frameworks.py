"""One algorithm, one copy: NumPy, torch, eager TensorFlow and tf.function send the same bytes.

Each way takes 50 steps on one sequence of gradients, through what its users run: the channel for
NumPy and torch, the adapter's ops for TensorFlow. Two ranks say the same, so that what was received
matters too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
import torch

import ef_horovod as ef
from ef_horovod import registry, wire
from ef_horovod.buckets import BucketPlan, one_slot
from ef_horovod.channel import Channel, finish_step
from ef_horovod.memories import save_memories
from ef_horovod.tensorflow import buckets
from ef_horovod.tensorflow.buckets import Bucket, receive
from ef_horovod.testing.echo import EchoTransport
from ef_horovod.testing.echo_tensorflow import EchoOps

D, STEPS = 700, 50
METHODS = [
    method
    for make in registry.METHODS.values()
    for kind in registry.COMPRESSORS.values()
    for compressor in kind.examples()
    for method in make.examples(compressor)
]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def gradients():
    """float32[STEPS, D]: correlated over steps, of very different sizes."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=D) * np.exp(rng.normal(size=D))
    return (base + 0.5 * rng.normal(size=(STEPS, D))).astype(np.float32)


class Recorder(EchoTransport):
    """Notes what is sent."""

    def __init__(self):
        super().__init__(2)
        self.sent = []

    def allgather(self, name, data, measure=None):
        self.sent.append(data.tobytes())
        return super().allgather(name, data, measure)

    def allreduce(self, name, values):
        self.sent.append(np.asarray(values).tobytes())
        return super().allreduce(name, values)


class OneChannel(NamedTuple):
    """A channel in a bucket of one parameter."""

    channel: Channel
    slots: list


def facts(sent, directions, bucket):
    """What was sent and delivered, and what is remembered at the end, all as bytes."""
    (memories,) = save_memories([bucket]).values() or ({},)
    return {
        "sent": sent,
        "directions": directions,
        "memories": {field: np.asarray(value).tobytes() for field, value in memories.items()},
    }


def by_channel(method, like):
    transport, directions = Recorder(), []
    channel = Channel("0.weights", like, method, transport, seed=3)
    for step, gradient in enumerate(gradients()):
        channel.gradient[:] = torch.from_numpy(gradient) if torch.is_tensor(like) else gradient
        channel.start(step)
        (direction,) = finish_step([channel])
        directions.append(to_host(direction).tobytes())
    return facts(transport.sent, directions, OneChannel(channel, one_slot("0.weights", like)))


def to_host(array):
    return array.numpy() if torch.is_tensor(array) else array


def by_ops(method, wrap):
    plan = BucketPlan("0.weights", one_slot("0.weights", tf.Variable(tf.zeros(D))), method)
    bucket, sent = Bucket(plan, EchoOps(2), exchange="auto", seed=3), []
    collect = bucket._courier.collect

    def collect_and_note(name):
        message = collect(name)
        sent.append(message.numpy().tobytes() if tf.is_tensor(message) else message.tobytes())
        return message

    bucket._courier.collect = collect_and_note
    counter, one = tf.Variable(0, dtype=tf.int64), tf.constant(1.0)

    @wrap
    def reduce(gradient):
        step = counter.read_value()
        arrived = bucket.send(step, one, [gradient])
        (direction,), good, next_step = receive([bucket], [arrived], step, one, tf.constant(True))
        counter.assign(next_step)
        return direction, good

    directions = []
    for gradient in gradients():
        direction, good = reduce(tf.constant(gradient))
        assert good
        directions.append(direction.numpy().tobytes())
    assert counter.numpy() == STEPS
    return facts(sent, directions, bucket)


def says_nothing(data):
    """Whether it is a message of a worker that does not take part in a step."""
    return len(data) == wire.HEADER_NBYTES and data[3] == wire.ABSENT


def eager(function):
    return function


@each_method
def test_all_frameworks_send_the_same_bytes_and_end_with_the_same_memories(method):
    reference = by_channel(method, np.zeros(D, np.float32))
    said = [data for data in reference["sent"] if not says_nothing(data)]
    assert len(set(said)) == len(said) > STEPS // 4, "some steps send the same"
    assert len(said) == STEPS or method.participation is not None
    for name, others in {
        "torch": by_channel(method, torch.zeros(D)),
        "eager TensorFlow": by_ops(method, eager),
        "tf.function": by_ops(method, tf.function),
    }.items():
        for fact, expected in reference.items():
            assert others[fact] == expected, f"{fact} of {name} differ from NumPy's"


def test_memories_are_compared_where_there_are_some():
    memories = by_channel(ef.EF21(ef.TopK(ratio=0.1), momentum=0.3), np.zeros(D, np.float32))[
        "memories"
    ]
    assert {"worker.tracked", "worker.velocity", "server.total"} <= memories.keys()
    assert any(memories["worker.tracked"])


EXACT_ON_DEVICES = [
    # OneBit's scale is a sum, which TensorFlow's own ops take in another order.
    method
    for method in METHODS
    if not isinstance(method.compressor, ef.OneBit)
]


@pytest.mark.parametrize("method", EXACT_ON_DEVICES, ids=repr)
@pytest.mark.parametrize("wrap", [eager, tf.function], ids=["eager", "tf.function"])
def test_the_way_for_gpus_sends_the_same_bytes(method, wrap, monkeypatch):
    """With vectors in tf.Variables and TensorFlow's own ops, on the CPU."""
    monkeypatch.setattr(buckets, "on_gpu", lambda variable: True)
    reference = by_channel(method, np.zeros(D, np.float32))
    others = by_ops(method, wrap)
    for fact, expected in reference.items():
        assert others[fact] == expected, f"{fact} differ from NumPy's"
