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
        assert isinstance(channel, NodeChannel)
        self.channel, self._inner = channel, channel.inner
        levels = transport.levels()
        self._node, self._cross = levels.node, levels.cross
        self._node_bridge = _bridge(channel.levels.node)

    @property
    def sliced(self) -> bool:
        """Whether this rank answers for a slice of its slice."""
        return self._inner is not None and self._inner.exchange.has_answers

    def collect_sum(self) -> list[np.ndarray]:
        """The gradient in slices: uint8[m] and int32[ranks of the node]."""
        return list(self._node_bridge.collect_slices(self.channel.names.sum))

    def relay(self, message: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """Ops that sum the slices within the node and exchange the payload between nodes."""
        name, inner = self.channel.names.sum, self._inner
        message, lengths = tf.ensure_shape(message, [None]), tf.ensure_shape(lengths, [None])
        arrived = self._node.carry_slices(name, message, lengths)

        def run(arrived: np.ndarray) -> Any:
            self._node_bridge.bring(name, arrived)
            self.channel.relay()
            if inner is None:
                return NOTHING
            if self.sliced:
                return list(self._cross_bridge.collect_slices(inner.name))
            return self._cross_bridge.collect(inner.name)

        if self.sliced:
            assert inner is not None
            kinds = [tf.uint8, tf.int32]
            parts, lengths = python_op(run, [arrived], kinds, stateful=False)
            parts, lengths = tf.ensure_shape(parts, [None]), tf.ensure_shape(lengths, [None])
            return self._cross.carry_slices(inner.name, parts, lengths)
        kind = tf.float32 if inner is not None and inner.exchange.sums else tf.uint8
        payload = tf.ensure_shape(python_op(run, [arrived], kind, stateful=False), [None])
        return payload if inner is None else self._cross.carry(inner.name, payload)

    def bring(self, arrived: np.ndarray) -> None:
        """Pass on the payloads of the other nodes."""
        if self._inner is not None:
            self._cross_bridge.bring(self._inner.name, arrived)

    def collect_flag(self) -> np.ndarray:
        """Whether this rank's slice is good."""
        return self._node_bridge.collect(self.channel.names.good)

    def carry_flag(self, flag: tf.Tensor) -> tf.Tensor:
        """The op that exchanges these within the node."""
        return self._node.carry(self.channel.names.good, tf.ensure_shape(flag, [None]))

    def bring_flags(self, flags: np.ndarray) -> None:
        """Pass on the data received by that op."""
        self._node_bridge.bring(self.channel.names.good, flags)

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
        return self._node_bridge.collect(self.channel.names.slices)

    def carry_slices(self, part: tf.Tensor) -> tf.Tensor:
        """The op that exchanges these within the node."""
        return self._node.carry(self.channel.names.slices, tf.ensure_shape(part, [None]))

    def bring_slices(self, slices: np.ndarray) -> None:
        """Pass on the data received by that op."""
        self._node_bridge.bring(self.channel.names.slices, slices)

    @property
    def _cross_bridge(self) -> GraphBridge:
        return _bridge(self.channel.levels.cross)


def _bridge(transport: Transport | None) -> GraphBridge:
    assert isinstance(transport, GraphBridge)
    return transport
