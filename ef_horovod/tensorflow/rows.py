"""Sparse gradients of embeddings, sent as rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from ef_horovod.exchange import rows
from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.tensorflow.graphs import WholeSteps, python_op
from ef_horovod.transports.horovod_tensorflow import HorovodTensorFlowTransport


class Rows:
    """Exchange of one variable's `tf.IndexedSlices`: uncompressed, each row once per rank.

    Args:
        name: of the variable.
        shape: of the variable.
        transport: to the other ranks.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], transport: HorovodTensorFlowTransport
    ) -> None:
        self._transport, self._bridge = transport, transport.bridge()
        self._channel = rows.RowsChannel(name, *rows.matrix_of(shape), self._bridge)
        self._whole = WholeSteps(name)

    @property
    def stats(self) -> ChannelStats:
        """Statistics of all sends so far."""
        return self._channel.stats()

    def exchange(
        self, gradient: tf.IndexedSlices, step: tf.Tensor
    ) -> tuple[tf.IndexedSlices, tf.Tensor]:
        """Ops that average the rows of all ranks.

        Args:
            gradient: this rank's; a row may occur more than once.
            step: the step's number; this input keeps the order of steps.

        Returns:
            Each row once, in float32, and whether all rows are finite.
        """
        values = tf.cast(gradient.values, tf.float32)
        inputs = [step, tf.cast(gradient.indices, tf.int64), values]
        message = python_op(self._push, inputs, tf.uint8, stateful=False)
        arrived = self._transport.carry(self._channel.name, tf.ensure_shape(message, [None]))
        kinds = [tf.int64, tf.float32, tf.bool]
        indices, means, finite = python_op(self._finish, [arrived], kinds)
        row = gradient.values.shape[1:]
        means = tf.ensure_shape(tf.reshape(means, [-1, *row]), [None, *row])
        slices = tf.IndexedSlices(means, tf.ensure_shape(indices, [None]), gradient.dense_shape)
        return slices, tf.ensure_shape(finite, [])

    def _push(self, step: Any, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
        values = values.reshape(len(indices), self._channel.width)
        self._channel.rows = rows.Rows(indices, values)
        with self._whole.beginning():
            self._channel.start(int(step))
        return self._bridge.collect(self._channel.name)

    def _finish(self, arrived: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.bool_]:
        self._bridge.bring(self._channel.name, arrived)
        finite = self._channel.arrived()
        mean = self._channel.commit()
        self._whole.end()
        return mean.indices, mean.values, np.bool_(finite)
