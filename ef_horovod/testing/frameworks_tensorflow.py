"""Steps with the ops of the TensorFlow adapter, without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from ef_horovod.methods.base import Method
from ef_horovod.tensorflow.buckets import Bucket, receive
from ef_horovod.testing.echo_tensorflow import EchoOps
from ef_horovod.testing.frameworks import (
    NAME,
    RANKS,
    SHAPE,
    STEPS,
    Facts,
    facts,
    gradient_sequence,
)
from ef_horovod.testing.tools import require
from ef_horovod.training.buckets import BucketPlan, one_slot


def eager(function: Any) -> Any:
    """Stands for `tf.function` in eager mode."""
    return function


def by_ops(method: Method, wrap: Callable[[Any], Any] = eager) -> Facts:
    """Steps with a bucket of one variable; `wrap` is `eager` or `tf.function`."""
    plan = BucketPlan(NAME, one_slot(NAME, tf.Variable(tf.zeros(SHAPE))), method)
    bucket, sent = Bucket(plan, EchoOps(RANKS), exchange="auto", seed=3), []
    collect = bucket._bridge.collect

    def collect_and_note(name: str) -> Any:
        message = collect(name)
        sent.append(np.asarray(message).tobytes())
        return message

    bucket._bridge.collect = collect_and_note  # type: ignore[method-assign]
    counter, one = tf.Variable(0, dtype=tf.int64), tf.constant(1.0)

    @wrap
    def reduce(gradient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        step = counter.read_value()
        arrived = bucket.send(step, one, [gradient])
        (direction,), good, next_step = receive([bucket], [arrived], step, one, tf.constant(True))
        counter.assign(next_step)
        return direction, good

    directions = []
    for step, gradient in enumerate(gradient_sequence()):
        direction, good = reduce(tf.constant(gradient.reshape(SHAPE)))
        require(good, method, f"drops step {step}, whose gradients are finite")
        directions.append(direction.numpy().tobytes())
    require(counter.numpy() == STEPS, method, "counts steps in a graph wrongly")
    return facts(sent, directions, bucket)
