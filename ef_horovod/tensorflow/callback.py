"""`ef.TrainingCallback`: what `model.fit` on several ranks needs beside the optimizer."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ef_horovod.channel import ChannelStats
from ef_horovod.tensorflow.sync import broadcast_variables, require_horovod, require_in_sync
from ef_horovod.transports.horovod_tensorflow import HorovodTensorFlowTransport


class TrainingCallback(keras.callbacks.Callback):
    """Equal start on all ranks, a check that they stay equal, means of metrics, and logs.

    At the start, weights and optimizer variables are broadcast from one rank. After the first
    batch, parameters are compared by hash: an optimizer that is not wrapped raises. At the end of
    an epoch, metrics become means over ranks, so that callbacks which stop training or change the
    learning rate decide the same everywhere, and these are added to the logs, for the history,
    TensorBoard and all callbacks after this one in the list:

        ef_bytes    bytes that this rank sent in a step
        ef_ratio    the same over what dense float32 would have sent
        ef_error    ||x - C(x)|| / ||x|| of the last step's compression
        ef_skipped  steps left out in this epoch, for a NaN or an infinity on some rank

    For Keras 3 and tf_keras. Put it first in the list, on all ranks.

    Args:
        root_rank: whose values all ranks start from.
        average_metrics: whether logs become means over ranks.
        check_sync: whether parameters are compared after the first batch.

    Raises:
        OutOfSyncError: parameters differ after the first batch.
        UnsupportedError: Horovod is not initialised, as in a job with parameter servers.

    Example:
        model.fit(inputs, labels, callbacks=[ef.TrainingCallback()])
    """

    def __init__(
        self, root_rank: int = 0, *, average_metrics: bool = True, check_sync: bool = True
    ) -> None:
        super().__init__()
        self._root_rank = root_rank
        self._average_metrics, self._check_sync = average_metrics, check_sync
        self._checked = False
        self._before = ChannelStats("total", 0, "", "")

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast."""
        require_horovod("ef.TrainingCallback")
        optimizer = self.model.optimizer
        with tf.init_scope():
            if not getattr(optimizer, "built", False):
                optimizer.build(self.model.trainable_variables)
        # Weights, not all variables: the seeds of random layers may differ between ranks.
        broadcast_variables([*self.model.weights, *optimizer.variables], self._root_rank)
        self._transport = HorovodTensorFlowTransport("ef.callback")
        self._checked = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Compare parameters once."""
        if self._check_sync and not self._checked:
            require_in_sync(self.model.trainable_variables)
        self._checked = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Change and extend the logs, in place."""
        if logs is None:
            return
        if self._average_metrics and self._transport.size > 1:
            self._average(logs)
        stats: list[ChannelStats] = getattr(self.model.optimizer, "stats", list)()
        if stats:
            logs.update(self._compression_logs(stats[-1]))

    # tf_keras asks these of its callbacks, and Keras 3's base class does not have them.
    def _implements_train_batch_hooks(self) -> bool:
        return True

    def _implements_test_batch_hooks(self) -> bool:
        return False

    def _implements_predict_batch_hooks(self) -> bool:
        return False

    def _average(self, logs: dict[str, Any]) -> None:
        names = sorted(logs)
        digest = hashlib.sha256("\n".join(names).encode()).digest()
        digests = self._transport.allgather("metric_names", np.frombuffer(digest, np.uint8))()
        if any(part.tobytes() != digest for part in digests):
            warnings.warn(
                f"metrics are not averaged: rank {self._transport.rank} has {names}, another rank "
                "has others; give all ranks the same metrics and validation data",
                stacklevel=2,
            )
            return
        values = np.array([float(logs[name]) for name in names])
        means = self._transport.allreduce("metrics", values)() / self._transport.size
        logs.update(zip(names, means.tolist(), strict=True))

    def _compression_logs(self, total: ChannelStats) -> dict[str, float]:
        before = self._before
        steps = total.steps - before.steps
        sent = total.bytes_out - before.bytes_out
        dense = total.dense_bytes_out - before.dense_bytes_out
        skipped = total.skipped - before.skipped
        sends = steps + skipped  # what is skipped was sent all the same
        self._before = total
        return {
            "ef_bytes": sent / sends if sends else 0.0,
            "ef_ratio": sent / dense if dense else 0.0,
            "ef_error": total.relative_error,
            "ef_skipped": float(skipped),
        }
