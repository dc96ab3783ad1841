"""The ops of a bucket whose gradients are summed within a node first.

    push --> alltoall in the node --> relay --> exchange between nodes --.
                                                                          \\
    finish <-- allgather in the node <-- share <-- agree <-- flags in the node, of all buckets

All functions in the boxes are those of the bucket's channel; see `exchange.hierarchical`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from ef_horovod.exchange.channel import Channel
from ef_horovod.exchange.hierarchical import NodeChannel
from ef_horovod.exchange.warmup import WarmupChannel
from ef_horovod.tensorflow.graphs import python_op
from ef_horovod.transports.base import Transport
from ef_horovod.transports.horovod_tensorflow import GraphBridge

NOTHING = np.zeros(1, np.uint8)  # carried in a dropped step, because ops run in all steps


class NodeOps:
    """The collectives of one bucket, within a node and between nodes.

    Args:
        channel: of the bucket.
        transport: to all ranks; its levels carry the messages.
    """

    def __init__(self, channel: Channel, transport: Any) -> None:
        # The dense steps' channel has the same levels and names.
        by_node = channel.compressed if isinstance(channel, WarmupChannel) else channel
        assert isinstance(by_node, NodeChannel)
        self.channel, self._names, self._inner = channel, by_node.names, by_node.inner
        levels = transport.levels()
        self._node, self._cross = levels.node, levels.cross
        self._node_bridge = _bridge(by_node.levels.node)
        self._between = by_node.levels.cross

    @property
    def sliced(self) -> bool:
        """Whether this rank answers for a slice of its slice."""
        return self._inner is not None and self._inner.exchange.has_answers

    def collect_sum(self) -> list[np.ndarray]:
        """The gradient in slices: uint8[m] and int32[ranks of the node]."""
        return list(self._node_bridge.collect_slices(self._names.sum))

    def relay(self, step: tf.Tensor, message: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """Ops that sum the slices within the node and exchange the payload between nodes."""
        name, inner = self._names.sum, self._inner
        message, lengths = tf.ensure_shape(message, [None]), tf.ensure_shape(lengths, [None])
        arrived = self._node.carry_slices(name, message, lengths)

        def run(arrived: np.ndarray) -> Any:
            self._node_bridge.bring(name, arrived)
            self.channel.relay()
            if inner is None:
                return NOTHING
            if self.sliced:
                return list(self._cross_bridge.collect_slices(inner.name))
            payload = self._cross_bridge.collect(inner.name)
            return payload.view(np.uint8) if self.channel.sums_before else payload

        if self.sliced:
            assert inner is not None
            kinds = [tf.uint8, tf.int32]
            parts, lengths = python_op(run, [arrived], kinds, stateful=False)
            parts, lengths = tf.ensure_shape(parts, [None]), tf.ensure_shape(lengths, [None])
            return self._cross.carry_slices(inner.name, parts, lengths)
        kind = tf.float32 if inner is not None and inner.sums else tf.uint8
        payload = tf.ensure_shape(python_op(run, [arrived], kind, stateful=False), [None])
        if inner is None:
            return payload
        return carried(self._cross, inner.name, payload, step, self.channel.sums_before)

    def bring(self, arrived: np.ndarray) -> None:
        """Pass on the payloads of the other nodes."""
        if self._inner is not None:
            self._cross_bridge.bring(self._inner.name, arrived)

    def collect_flag(self) -> np.ndarray:
        """Whether this rank's slice is good."""
        return self._node_bridge.collect(self._names.good)

    def carry_flag(self, flag: tf.Tensor) -> tf.Tensor:
        """The op that exchanges these within the node."""
        return self._node.carry(self._names.good, tf.ensure_shape(flag, [None]))

    def bring_flags(self, flags: np.ndarray) -> None:
        """Pass on the data received by that op."""
        self._node_bridge.bring(self._names.good, flags)

    def collect_answer(self) -> np.ndarray:
        """This rank's answer, if it is `sliced`."""
        assert self._inner is not None
        return self._cross_bridge.collect(self._inner.answers)

    def carry_answer(self, answer: tf.Tensor) -> tf.Tensor:
        """The op that exchanges these between nodes."""
        assert self._inner is not None
        return self._cross.carry(self._inner.answers, tf.ensure_shape(answer, [None]))

    def bring_answers(self, answers: np.ndarray) -> None:
        """Pass on the data received by that op."""
        assert self._inner is not None
        self._cross_bridge.bring(self._inner.answers, answers)

    def share(self) -> np.ndarray:
        """Aggregate; this rank's slice of the aggregated gradient, as bytes."""
        self.channel.share()
        return self._node_bridge.collect(self._names.slices)

    def carry_slices(self, part: tf.Tensor) -> tf.Tensor:
        """The op that exchanges these within the node."""
        return self._node.carry(self._names.slices, tf.ensure_shape(part, [None]))

    def bring_slices(self, slices: np.ndarray) -> None:
        """Pass on the data received by that op."""
        self._node_bridge.bring(self._names.slices, slices)

    @property
    def _cross_bridge(self) -> GraphBridge:
        return _bridge(self._between)


def carried(
    transport: Any, name: str, message: tf.Tensor, step: tf.Tensor, sums_before: int
) -> tf.Tensor:
    """The op that exchanges a message; in steps before `sums_before` it sums the floats in it."""
    if not sums_before:
        return transport.carry(name, message)
    with tf.device("/CPU:0"):
        return tf.cond(
            step < sums_before,
            lambda: _as_bytes(transport.carry(name, _as_floats(message))),
            lambda: transport.carry(name, message),
        )


def _as_floats(data: tf.Tensor) -> tf.Tensor:
    """uint8[4 m] as float32[m], the same memory."""
    return tf.bitcast(tf.reshape(data, [-1, 4]), tf.float32)


def _as_bytes(numbers: tf.Tensor) -> tf.Tensor:
    """The reverse."""
    return tf.reshape(tf.bitcast(numbers, tf.uint8), [-1])


def _bridge(transport: Transport | None) -> GraphBridge:
    assert isinstance(transport, GraphBridge)
    return transport
