"""Sparse gradients of embeddings, sent as the rows that they touch."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from ef_horovod.channel import ChannelStats
from ef_horovod.transports.base import ring_share
from ef_horovod.transports.horovod_tensorflow import HorovodTensorFlowTransport


class Rows:
    """Exchange of one variable's `tf.IndexedSlices`: uncompressed, each row once a rank.

    Args:
        name: of the variable.
        shape: of the variable.
        transport: to the other ranks.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], transport: HorovodTensorFlowTransport
    ) -> None:
        self._name, self._transport = f"rows.{name}", transport
        self._row_nbytes = 8 + 4 * math.prod(shape[1:])  # an int64 index and float32 values
        self._dense_nbytes = ring_share(4 * math.prod(shape), transport.size)
        self.stats = ChannelStats(self._name, math.prod(shape), "rows as they are", "gather")

    def exchange(self, gradient: tf.IndexedSlices) -> tuple[tf.IndexedSlices, tf.Tensor]:
        """Ops that sum the rows of all ranks; each row once, in float32, and whether all finite."""
        mine = coalesced(gradient)
        gather = self._transport.gather_rows
        everyones = tf.IndexedSlices(
            gather(f"{self._name}.values", mine.values),
            gather(f"{self._name}.indices", mine.indices),
        )
        total = coalesced(everyones)
        finite = tf.numpy_function(
            self._arrived,
            [
                tf.shape(mine.indices)[0],
                tf.shape(everyones.indices)[0],
                tf.reduce_all(tf.math.is_finite(total.values)),
            ],
            tf.bool,
        )
        values = tf.ensure_shape(total.values, [None, *gradient.values.shape[1:]])
        slices = tf.IndexedSlices(values, total.indices, gradient.dense_shape)
        return slices, tf.ensure_shape(finite, [])

    def _arrived(self, own: np.int32, everyones: np.int32, finite: np.bool_) -> np.bool_:
        self.stats.steps += 1
        self.stats.bytes_out += int(own) * self._row_nbytes * (self._transport.size - 1)
        self.stats.bytes_in += (int(everyones) - int(own)) * self._row_nbytes
        self.stats.dense_bytes_out += self._dense_nbytes
        return finite


def coalesced(slices: tf.IndexedSlices) -> tf.IndexedSlices:
    """The same sum with each row once; float32 values and int64 indices."""
    indices, places = tf.unique(tf.cast(slices.indices, tf.int64))
    values = tf.math.unsorted_segment_sum(
        tf.cast(slices.values, tf.float32), places, tf.shape(indices)[0]
    )
    return tf.IndexedSlices(values, indices, slices.dense_shape)
