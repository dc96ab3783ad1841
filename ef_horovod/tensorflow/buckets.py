"""A bucket of TensorFlow variables, and a step of several of them as ops of a graph.

Each op here is a `tf.numpy_function`: Python that runs when the executor gets there, on views of
the tensors' memory. On a GPU it is a `tf.py_function` with tensors that stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays import tensorflow as tensors
from ef_horovod.buckets import BucketPlan, Slot
from ef_horovod.channel import finish_step
from ef_horovod.tensorflow.variables import native, on_gpu
from ef_horovod.transports.server_tensorflow import GraphTransport

_ALIGNMENT = 64  # bytes; TensorFlow takes over such arrays without a copy


class Bucket:
    """Variables that travel together, and their channel.

    Args:
        plan: its variables and how they travel.
        transport: to the other ranks, or to servers.
        exchange: "auto", "gather", "reduce" or "server".
        seed: of random compressors.
    """

    def __init__(
        self, plan: BucketPlan, transport: GraphTransport, *, exchange: str, seed: int
    ) -> None:
        self.slots: list[Slot] = plan.slots
        first = native(self.slots[0].parameter)
        self.on_gpu = on_gpu(first)
        like = tensors.zeros(plan.length, first.device if self.on_gpu else None)
        self._transport, self._courier = transport, transport.courier()
        self.channel = plan.open(like, self._courier, exchange=exchange, seed=seed)

    def send(self, step: tf.Tensor, loss_scale: tf.Tensor, gradients: list[tf.Tensor]) -> tf.Tensor:
        """Ops that compress the gradients and exchange them; what has arrived.

        From servers nothing has by then; `receive` waits for them.
        """
        inputs = [step, loss_scale, *gradients]
        dtype = tf.float32 if self.channel.exchange in ("dense", "reduce") else tf.uint8
        # Stateless, so that no control dependency makes one bucket wait for another; that a step
        # comes after the last one follows from the step counter among its inputs.
        if self.on_gpu:
            message = tf.py_function(self._push, inputs, dtype)
        else:
            message = tf.numpy_function(self._push, inputs, dtype, stateful=False)
        return self._transport.carry(self.channel.name, tf.ensure_shape(message, [None]))

    def bring(self, arrived: Array) -> None:
        """Hand over what `send`'s op has brought."""
        received = arrived if self.channel.exchange == "dense" else np.asarray(arrived)
        self._courier.bring(self.channel.name, received)

    def _push(self, step: Any, loss_scale: Any, *gradients: Array) -> Array:
        flat = self.channel.gradient
        xp = namespace(flat)
        for slot, gradient in zip(self.slots, gradients, strict=True):
            xp.write(flat, slot.start, gradient)
        if float(loss_scale) != 1.0:
            xp.divide(flat, float(loss_scale), out=flat)
        self.channel.start(int(step))
        message = self._courier.collect(self.channel.name)
        return tf.identity(message) if isinstance(message, tf.Variable) else message


def receive(
    buckets: Sequence[Bucket],
    arrived: list[tf.Tensor],
    step: tf.Tensor,
    factor: tf.Tensor,
    rows_good: tf.Tensor,
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
    """Ops that finish a step: all buckets commit, or none.

    Args:
        buckets: that were sent.
        arrived: what each one's `send` gave.
        step: its number.
        factor: directions are multiplied by it.
        rows_good: whether what travelled beside the buckets was finite.

    Returns:
        float32 directions in the order of all slots (NaN for a dropped step), whether the step is
        good, and the number of the next step.
    """
    slots = [slot for bucket in buckets for slot in bucket.slots]
    gpu = any(bucket.on_gpu for bucket in buckets)

    def finish(step: Any, factor: Any, rows_good: Any, *arrived: Array) -> list[Any]:
        for bucket, message in zip(buckets, arrived, strict=True):
            bucket.bring(message)
        channels = [bucket.channel for bucket in buckets]
        directions = finish_step(channels, good=bool(rows_good))
        good = directions is not None
        parts = [
            _part(directions[i] if directions else None, slot, float(factor))
            for i, bucket in enumerate(buckets)
            for slot in bucket.slots
        ]
        return [np.bool_(good), np.int64(step) + np.int64(good), *parts]

    function = tf.py_function if gpu else tf.numpy_function
    kinds = [tf.bool, tf.int64] + [tf.float32] * len(slots)
    good, next_step, *directions = function(finish, [step, factor, rows_good, *arrived], kinds)
    good, next_step = tf.ensure_shape(good, []), tf.ensure_shape(next_step, [])
    shaped = [
        tf.ensure_shape(direction, slot.parameter.shape)
        for direction, slot in zip(directions, slots, strict=True)
    ]
    return shaped, good, next_step


def _part(direction: Array | None, slot: Slot, factor: float) -> Array:
    """A variable's part of a direction, in memory of its own; NaN if there is none."""
    shape = tuple(slot.parameter.shape)
    if direction is not None and not isinstance(direction, np.ndarray):  # on a GPU
        part = tf.reshape(direction[slot.start : slot.stop], shape)
        return part if factor == 1.0 else part * factor
    part = _aligned(slot.stop - slot.start)
    if direction is None:
        part.fill(np.nan)
    else:
        np.multiply(direction[slot.start : slot.stop], np.float32(factor), out=part)
    return part.reshape(shape)


def _aligned(length: int) -> np.ndarray:
    """float32[length] that TensorFlow takes over as it is; nothing else may refer to it."""
    raw = np.empty(4 * length + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + 4 * length].view(np.float32)
