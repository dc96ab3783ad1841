"""A bucket of TensorFlow variables, and one step of several buckets as graph ops.

Each op here is a `tf.numpy_function`: Python code that the executor runs on views of the tensors'
memory. Channels have NumPy arrays; what is on a GPU is copied to the host and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ef_horovod.arrays import Array, namespace
from ef_horovod.exchange.channel import agree, arrive, conclude, settle
from ef_horovod.tensorflow.graphs import WholeSteps, python_op
from ef_horovod.tensorflow.nodes import NOTHING, NodeOps, carried
from ef_horovod.tensorflow.server_transport import GraphTransport
from ef_horovod.training.buckets import BucketPlan, Slot

_ALIGNMENT = 64  # bytes; TensorFlow uses such arrays without a copy


class Bucket:
    """Variables that are sent together, and their channel.

    Args:
        plan: the variables and their method.
        transport: to the other ranks, or to servers.
        exchange: "auto", "auto:NETWORK", "gather", "reduce", "double_pass" or "server".
        seed: of random compressors.
    """

    def __init__(
        self, plan: BucketPlan, transport: GraphTransport, *, exchange: str, seed: int
    ) -> None:
        self.slots: list[Slot] = plan.slots
        like = np.zeros(plan.length, np.float32)
        self._transport, self._bridge = transport, transport.bridge()
        self.channel = plan.open(like, self._bridge, exchange=exchange, seed=seed)
        way = self.channel.exchange
        by_ops = way.by_node and not way.needs_server  # in a job with servers no ops carry messages
        self.nodes = NodeOps(self.channel, transport) if by_ops else None
        self.whole = WholeSteps(self.channel.name)

    def send(self, step: tf.Tensor, loss_scale: tf.Tensor, gradients: list[tf.Tensor]) -> tf.Tensor:
        """Ops that compress the gradients and exchange them; returns the received data.

        With servers it is still empty; `receive` waits for it.
        """
        inputs, name = [step, loss_scale, *gradients], self.channel.name
        if self.nodes is not None:
            message, lengths = self._now(self._push_slices, inputs, [tf.uint8, tf.int32])
            return self.nodes.relay(step, message, lengths)
        if self.sliced:
            message, lengths = self._now(self._push_slices, inputs, [tf.uint8, tf.int32])
            message, lengths = tf.ensure_shape(message, [None]), tf.ensure_shape(lengths, [None])
            return self._transport.carry_slices(name, message, lengths)
        kind = tf.float32 if self.channel.exchange.sums else tf.uint8
        message = tf.ensure_shape(self._now(self._push, inputs, kind), [None])
        return carried(self._transport, name, message, step, self.channel.sums_before)

    def _now(self, function: Callable[..., Any], inputs: list[Any], kinds: Any) -> Any:
        """An op that runs a function as soon as its inputs exist."""
        # Stateless, so that no control dependency makes one bucket wait for another. The step
        # counter among the inputs keeps the order of steps.
        return python_op(function, inputs, kinds, stateful=False)

    def bring(self, arrived: np.ndarray) -> None:
        """Pass on the data received by `send`'s op."""
        if self.nodes is not None:
            self.nodes.bring(arrived)
        else:
            self._bridge.bring(self.channel.name, arrived)

    @property
    def sliced(self) -> bool:
        """Whether each rank answers for a slice between the two halves of a step."""
        return self.channel.exchange.has_answers if self.nodes is None else self.nodes.sliced

    def collect_answer(self) -> np.ndarray:
        """This rank's answer."""
        if self.nodes is not None:
            return self.nodes.collect_answer()
        return self._bridge.collect(self.channel.answers)

    def carry_answer(self, answer: tf.Tensor) -> tf.Tensor:
        """The op that exchanges the answers of all ranks."""
        if self.nodes is not None:
            return self.nodes.carry_answer(answer)
        return self._transport.carry(self.channel.answers, tf.ensure_shape(answer, [None]))

    def bring_answers(self, arrived: np.ndarray) -> None:
        """Pass on the data received by that op."""
        if self.nodes is not None:
            self.nodes.bring_answers(arrived)
            return
        self._bridge.bring(self.channel.answers, arrived)

    def _push(self, step: Any, loss_scale: Any, *gradients: Array) -> Array:
        self._start(step, loss_scale, gradients)
        message = self._bridge.collect(self.channel.name)
        return message.view(np.uint8) if self.channel.sums_before else message

    def _push_slices(self, step: Any, loss_scale: Any, *gradients: Array) -> list[Array]:
        self._start(step, loss_scale, gradients)
        if self.nodes is not None:
            return self.nodes.collect_sum()
        return list(self._bridge.collect_slices(self.channel.name))

    def _start(self, step: Any, loss_scale: Any, gradients: Sequence[Array]) -> None:
        flat = self.channel.gradient
        xp = namespace(flat)
        for slot, gradient in zip(self.slots, gradients, strict=True):
            xp.write(flat, slot.start, gradient)
        if float(loss_scale) != 1.0:
            xp.divide(flat, float(loss_scale), out=flat)
        with self.whole.beginning():
            self.channel.start(int(step))


def receive(
    buckets: Sequence[Bucket],
    arrived: list[tf.Tensor],
    step: tf.Tensor,
    factor: tf.Tensor,
    rows_good: tf.Tensor,
    *,
    undoable: bool = False,
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
    """Ops that finish a step: all buckets commit, or none.

    Args:
        buckets: all sent buckets.
        arrived: the result of each one's `send`.
        step: its number.
        factor: aggregated gradients are multiplied by it.
        rows_good: whether gradients sent as rows were finite.
        undoable: whether channels keep their earlier state, to undo the step.

    Returns:
        float32 aggregated gradients in the order of all slots (NaN for a dropped step), whether the
        step is good, and the number of the next step.
    """
    slots = [slot for bucket in buckets for slot in bucket.slots]
    sliced = [bucket for bucket in buckets if bucket.sliced and bucket.nodes is None]
    nodes = [bucket.nodes for bucket in buckets if bucket.nodes is not None]
    channels = [bucket.channel for bucket in buckets]
    if sliced or nodes:  # bad steps are known before answers are sent; `arrived` is consumed here
        rows_good, arrived = _answers(buckets, arrived, rows_good, undoable)

    def finish(step: Any, factor: Any, good: Any, *arrived: Array) -> list[Any]:
        if sliced or nodes:
            takers = [bucket.bring_answers for bucket in sliced] + [n.bring_slices for n in nodes]
            for take, message in zip(takers, arrived, strict=True) if good else ():
                take(message)
        else:
            _bring(buckets, arrived)
            good = settle(channels, good=bool(good), undoable=undoable)
        directions = conclude(channels, good=bool(good))
        parts = [
            _part(directions[i] if directions else None, slot, float(factor))
            for i, bucket in enumerate(buckets)
            for slot in bucket.slots
        ]
        for bucket in buckets:
            bucket.whole.end()
        return [np.bool_(good), np.int64(step) + np.int64(good), *parts]

    kinds = [tf.bool, tf.int64] + [tf.float32] * len(slots)
    inputs = [step, factor, rows_good, *arrived]
    good, next_step, *directions = python_op(finish, inputs, kinds)
    good, next_step = tf.ensure_shape(good, []), tf.ensure_shape(next_step, [])
    shaped = [
        tf.ensure_shape(direction, slot.parameter.shape)
        for direction, slot in zip(directions, slots, strict=True)
    ]
    return shaped, good, next_step


def _answers(
    buckets: Sequence[Bucket], arrived: list[tf.Tensor], rows_good: tf.Tensor, undoable: bool
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Ops between the halves of a step for sliced buckets: each rank answers for its slice.

    Returns:
        Whether the step is good, and all ranks' answers for each such bucket, then the slices of
        each bucket that is summed within a node first.
    """
    nodes = [bucket.nodes for bucket in buckets if bucket.nodes is not None]
    sliced = sorted((b for b in buckets if b.sliced), key=lambda b: b.nodes is not None)
    channels = [bucket.channel for bucket in buckets]

    def meet(rows_good: Any, *arrived: Array) -> list[Any]:
        _bring(buckets, arrived)
        good = arrive(channels, good=bool(rows_good))
        return [np.bool_(good), *(one.collect_flag() for one in nodes)]

    def answer(rows_good: Any, *arrived: Array) -> list[Any]:
        if nodes:
            for one, flags in zip(nodes, arrived, strict=True):
                one.bring_flags(flags)
            good = agree(channels, good=bool(rows_good), undoable=undoable)
        else:
            _bring(buckets, arrived)
            good = settle(channels, good=bool(rows_good), undoable=undoable)
        answers = [bucket.collect_answer() if good else NOTHING for bucket in sliced]
        return [np.bool_(good), *answers]

    def share(good: Any, *answers: Array) -> list[Any]:
        for bucket, answer in zip(inner, answers, strict=True) if good else ():
            bucket.bring_answers(answer)
        return [np.bool_(good), *(one.share() if good else NOTHING for one in nodes)]

    if nodes:
        kinds = [tf.bool] + [tf.uint8] * len(nodes)
        rows_good, *flags = python_op(meet, [rows_good, *arrived], kinds, stateful=False)
        arrived = [one.carry_flag(flag) for one, flag in zip(nodes, flags, strict=True)]
    inputs, kinds = [rows_good, *arrived], [tf.bool] + [tf.uint8] * len(sliced)
    # Stateless like `_push`: with Horovod's tape, each variable has one of these.
    found = python_op(answer, inputs, kinds, stateful=False)
    good, *answers = [found] if tf.is_tensor(found) else found  # a single one in eager mode
    good = tf.ensure_shape(good, [])
    pairs = zip(sliced, answers, strict=True)
    carried = [bucket.carry_answer(own) for bucket, own in pairs]
    if not nodes:
        return good, carried
    inner = [bucket for bucket in sliced if bucket.nodes is not None]
    plain = len(sliced) - len(inner)
    kinds = [tf.bool] + [tf.uint8] * len(nodes)
    good, *parts = python_op(share, [good, *carried[plain:]], kinds, stateful=False)
    good = tf.ensure_shape(good, [])
    slices = [one.carry_slices(part) for one, part in zip(nodes, parts, strict=True)]
    return good, [*carried[:plain], *slices]


def _bring(buckets: Sequence[Bucket], arrived: Sequence[Array]) -> None:
    for bucket, message in zip(buckets, arrived, strict=True):
        bucket.bring(message)


def _part(direction: Array | None, slot: Slot, factor: float) -> Array:
    """A copy of a variable's part of the aggregated gradient; NaN if there is none."""
    shape = tuple(slot.parameter.shape)
    part = _aligned(slot.stop - slot.start)
    if direction is None:
        part.fill(np.nan)
    else:
        np.multiply(direction[slot.start : slot.stop], np.float32(factor), out=part)
    return part.reshape(shape)


def _aligned(length: int) -> np.ndarray:
    """float32[length] that TensorFlow uses without a copy; nothing else may refer to it."""
    raw = np.empty(4 * length + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + 4 * length].view(np.float32)
