"""`ef.TrainingCallback`: broadcast, checks and logs for `model.fit` on several ranks."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ef_horovod.common.options import whole
from ef_horovod.exchange.stats import ChannelStats, total_stats
from ef_horovod.tensorflow.broadcast import broadcast_variables
from ef_horovod.tensorflow.log import TrainingLog
from ef_horovod.tensorflow.sync import require_horovod, require_in_sync
from ef_horovod.tensorflow.wrapping import is_optimizer
from ef_horovod.transports.horovod_tensorflow import HorovodTensorFlowTransport


class TrainingCallback(keras.callbacks.Callback):
    """Broadcasts the start values, checks that ranks stay equal, averages metrics, adds logs.

    At the start, the weights and the variables of all the model's optimizers are broadcast from one
    rank. A model that its first batch would build (without `Input`, or subclassed) is built before
    it, by tracing its `train_step` once more. With `run_eagerly=True` such a model gets the values
    after the first batch, as with Horovod's callback. If ranks differed, this resets the
    error-feedback state. After the first batch, parameters are compared by hash, which detects an
    optimizer that is not wrapped.

    With the `local_steps` of `ef.CompressedUpdates`, `optimizer.exchange()` is called before
    validation and at the end of each epoch, so all ranks have the same weights there, and save
    the same ones. Parameters are compared after the first exchange.

    At the end of an epoch, metrics become means over ranks. Callbacks that stop training or change
    the learning rate then decide the same on all ranks. These logs are added, for the history,
    TensorBoard and all later callbacks in the list:

        ef_bytes    bytes that this rank sent per step
        ef_ratio    these bytes over those of uncompressed float32
        ef_error    ||x - C(x)|| / ||x|| of the last step's compression
        ef_skipped  steps dropped in this epoch because of a NaN or an infinity on some rank

    For Keras 3 and tf_keras. Put it first in the list, on all ranks.

    Args:
        root_rank: the rank whose values all ranks start from.
        average_metrics: whether logs become means over ranks.
        check_sync: whether parameters are compared after the first batch.
        log: path of an `ef.TrainingLog` about the model's wrapped optimizers, or None. Its loss is
            Keras' mean since the epoch began.
        log_every: batches per line of the log.

    Raises:
        LogError: `log` is another file, or cannot be written.
        ConfigMismatchError: ranks have different weights or optimizer variables.
        OutOfSyncError: parameters differ after the first batch.
        UnsupportedError: Horovod is not initialised, as in a job with parameter servers.

    Example:
        model.fit(inputs, labels, callbacks=[ef.TrainingCallback()])
    """

    def __init__(
        self,
        root_rank: int = 0,
        *,
        average_metrics: bool = True,
        check_sync: bool = True,
        log: str | Path | None = None,
        log_every: int = 10,
    ) -> None:
        super().__init__()
        whole("TrainingCallback", "log_every", log_every, 1, None, "10 writes every tenth batch")
        self._log_path, self._log_every = log, log_every
        self._log: TrainingLog | None = None
        self._root_rank = root_rank
        self._average_metrics, self._check_sync = average_metrics, check_sync
        self._started = self._checked = False
        self._before = ChannelStats("total", 0, "", "")

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast, now or in the step that builds the model."""
        require_horovod("ef.TrainingCallback")
        self._transport = HorovodTensorFlowTransport("ef.callback")
        self._started = self._checked = False
        model, optimizer = self.model, self.model.optimizer
        if not all(layer.built for layer in model._flatten_layers()):
            self._build_in_first_step()
            return
        with tf.init_scope():
            if not getattr(optimizer, "built", False):
                optimizer.build(model.trainable_variables)
        self._start()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Compare parameters once, when they have to be equal."""
        self._start()  # after an eager step that built the model
        self._compare()
        if self._log is not None:
            self._log.step((logs or {}).get("loss"))

    def on_train_end(self, logs: Any = None) -> None:
        """Write the log's last line."""
        if self._log is not None:
            self._log.close()

    def on_test_begin(self, logs: Any = None) -> None:
        """Let all ranks validate the same weights, if there are local steps."""
        self._exchange()

    def _compare(self) -> None:
        if self._checked or self._steps_since():
            return
        if self._check_sync:
            require_in_sync(self.model.trainable_variables)
        self._checked = True

    def _exchange(self) -> None:
        for optimizer in self._updating():
            optimizer.exchange()

    def _steps_since(self) -> int:
        """Local steps since the last exchange."""
        drivers = [driver for one in self._updating() for driver in one.drivers]
        return sum(driver.steps_since() for driver in drivers)

    def _updating(self) -> list[Any]:
        """The optimizers of `ef.CompressedUpdates`."""
        return [one for one in self._optimizers() if hasattr(one, "exchange")]

    def _build_in_first_step(self) -> None:
        """Make `fit` trace one step before its first one; tracing creates all variables."""
        model, train = self.model, self.model.train_function

        def first(iterator: Any) -> Any:
            model.train_function = train
            if not model.run_eagerly:
                # As in Keras: only tf_keras applies AutoGraph to the user's train_step.
                step = tf.function(model.train_step, autograph=not isinstance(model, keras.Model))
                step.get_concrete_function(iterator.element_spec)
                self._start()
            return train(iterator)

        model.train_function = first

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        self._exchange_restored()
        # Weights only: the seeds of random layers may differ between ranks.
        variables = [*self.model.weights]
        for optimizer in self._optimizers():
            variables += getattr(optimizer, "common_variables", optimizer.variables)
        broadcast_variables(variables, self._root_rank)
        if self._log_path is not None and self._log is None:
            ours = [one for one in self._optimizers() if hasattr(one, "drivers")]
            self._log = TrainingLog(self._log_path, ours, self._log_every)

    def _exchange_restored(self) -> None:
        """Exchange, if all ranks loaded a state from between two exchanges.

        The broadcast would otherwise overwrite what the other ranks have changed since.
        """
        if self._transport.size == 1 or not self._updating():
            return
        between = np.array([self._steps_since() > 0], np.uint8)
        if all(part[0] for part in self._transport.allgather("between", between)()):
            self._exchange()

    def _optimizers(self) -> list[Any]:
        """The model's optimizers, each once: from `compile` or in attributes (GANs)."""
        held = [self.model.optimizer, *vars(self.model).values()]
        return list({id(one): one for one in held if is_optimizer(one)}.values())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Let all ranks have the same weights; change and extend the logs, in place."""
        self._exchange()
        self._compare()
        if logs is None:
            return
        if self._average_metrics and self._transport.size > 1:
            self._average(logs)
        rows: list[ChannelStats] = []
        for optimizer in self._optimizers():
            rows += getattr(optimizer, "stats", list)()[:-1]
        if rows:
            logs.update(self._compression_logs(total_stats(rows)))

    # tf_keras calls these; Keras 3's base class lacks them.
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
        sends = steps + skipped  # skipped steps were sent too
        self._before = total
        return {
            "ef_bytes": sent / sends if sends else 0.0,
            "ef_ratio": sent / dense if dense else 0.0,
            "ef_error": total.relative_error,
            "ef_skipped": float(skipped),
        }
