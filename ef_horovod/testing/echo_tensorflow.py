"""`testing.echo` for the TensorFlow adapter, whose collectives are ops of a graph."""

from __future__ import annotations

import tensorflow as tf

from ef_horovod.transports.base import Transport
from ef_horovod.transports.horovod_tensorflow import HorovodTensorFlowTransport
from ef_horovod.transports.timeouts.alarm import Alarm


class EchoOps(HorovodTensorFlowTransport):
    """Rank 0 of `size` ranks that all send the same data.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        Transport.__init__(self, 0, size)
        self.prefix = "echo"
        self.alarm = Alarm(self.timeout, self._waited, lambda: None)

    @property
    def ranks_per_node(self) -> int:
        """All on nodes of their own."""
        return 1

    def carry(self, name: str, message: tf.Tensor) -> tf.Tensor:
        """As Horovod's op: gathers bytes, sums floats."""
        if message.dtype == tf.uint8:
            return tf.concat([message] * self.size, 0)
        return message * self.size

    def carry_slices(self, name: str, message: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """As Horovod's op: each rank's part for rank 0."""
        return tf.concat([message[: lengths[0]]] * self.size, 0)
