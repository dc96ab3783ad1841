"""From local gradients to averaged ones: the ops of a step, and their state."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.config_check import require_same_config
from ef_horovod.exchange.stats import ChannelStats, total_stats
from ef_horovod.tensorflow.broadcast import follow
from ef_horovod.tensorflow.buckets import Bucket, receive
from ef_horovod.tensorflow.graphs import refuse_replicas, refuse_xla
from ef_horovod.tensorflow.options import Options
from ef_horovod.tensorflow.rows import Rows
from ef_horovod.tensorflow.server_transport import GraphTransport, ServerBridge
from ef_horovod.tensorflow.sync import in_sync_op
from ef_horovod.tensorflow.variables import native, path_of, require_gradient_of
from ef_horovod.training.buckets import plan_buckets
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.momentum import refuse_rows

Gradient = Any  # tf.Tensor, tf.IndexedSlices or None


class Engine(StepDriver[Bucket]):
    """The buckets of a model and their steps.

    Buckets are made at the first call, when sparse and missing gradients are known.

    Args:
        named: variables with names that are equal on all ranks.
        options: see `Options`.
        transport: to the other ranks, or to servers.
    """

    def __init__(
        self,
        named: list[tuple[str, Any]],
        options: Options,
        transport: GraphTransport,
    ) -> None:
        super().__init__(options.method, transport)
        self.transport: GraphTransport = transport
        self.options, self._named, self.compressed = options, named, options.what
        self._kinds: list[str] = []  # of the gradients at the first call
        self._rows: dict[int, Rows] = {}  # by the variable's place
        self._loaded: dict[str, Any] | None = None  # state for buckets not made yet
        self._must_fit = False
        self._opened = False
        follow(self)
        with tf.init_scope():
            # The number of the next step. It also makes a step wait for the previous one.
            self.step = tf.Variable(0, trainable=False, dtype=tf.int64, name="ef_step")
            self._calls = tf.Variable(0, trainable=False, dtype=tf.int64, name="ef_calls")

    def reduce(
        self, gradients: Sequence[Gradient], loss_scale: tf.Tensor
    ) -> tuple[list[Gradient], tf.Tensor]:
        """Ops that average gradients over ranks; returns averages and whether the step is good."""
        refuse_xla()
        refuse_replicas()
        for gradient, (_, variable) in zip(gradients, self._named, strict=True):
            require_gradient_of(variable, gradient)
        gradients = self._begin([self._densified(g) for g in gradients])
        in_sync = self._compare_in_second_call() if self.options.check_sync else tf.constant(True)
        # Send no bucket before the ranks were compared. If the comparison raises on all ranks, one
        # might have sent a bucket that another has not, and would wait until its timeout.
        with tf.control_dependencies([in_sync]):
            step = tf.identity(self.step.read_value())
        place_of = {name: i for i, (name, _) in enumerate(self._named)}
        places = [[place_of[slot.name] for slot in bucket.slots] for bucket in self.buckets]
        arrived = [
            bucket.send(step, loss_scale, [gradients[i] for i in its])
            for bucket, its in zip(self.buckets, places, strict=True)
        ]
        rows = {i: exchange.exchange(gradients[i], step) for i, exchange in self._rows.items()}
        rows_good = tf.reduce_all([True, *(finite for _, finite in rows.values())])
        factor = loss_scale * (1 if self.options.average else self.transport.size)
        directions, good, next_step = receive(
            self.buckets, arrived, step, factor, rows_good, undoable=self.options.discardable
        )
        self.step.assign(next_step)
        reduced: list[Gradient] = [None] * len(gradients)
        for i, direction in zip((i for its in places for i in its), directions, strict=True):
            reduced[i] = tf.cast(direction, gradients[i].dtype)
        for i, (mean, _) in rows.items():
            reduced[i] = self._scaled(mean, good, gradients[i].dtype)
        return reduced, good

    def stats(self) -> list[ChannelStats]:
        """One row per bucket, then the total; call it between steps."""
        rows = [*super().stats()[:-1], *(rows.stats for rows in self._rows.values())]
        return [*rows, total_stats(rows)]

    def merged_state_dict(self) -> dict[str, Any]:
        """See `StepDriver.merged_state_dict`.

        Raises:
            UnsupportedError: before the first step, which makes the buckets.
        """
        if not self._opened:
            raise UnsupportedError(
                "got ef.save before the first step, expected it after a step, which finds out what "
                "is compressed; a training that has not begun needs no error-feedback state"
            )
        return super().merged_state_dict()

    def load_state_dict(self, state: dict[str, Any], *, must_fit: bool = True) -> None:
        """Load error-feedback state, now or as soon as the buckets are made.

        Args:
            state: the result of `state_dict`.
            must_fit: False for a checkpoint that may be another rank's. If it then does not fit
                some rank, all ranks start from zero with a warning, unless it comes after step 1.

        Raises:
            UnsupportedError: with servers, after the first step; servers load their state before.
            ValueError: the rank, number of ranks, method or model differs. If loaded before the
                first step, that step raises it on all ranks.
        """
        self._loaded, self._must_fit = state, must_fit
        if self._opened:
            self._load()

    def _load(self) -> None:
        state, self._loaded = self._loaded, None
        if state is not None:
            self._load_now(state)

    def _load_now(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)

    @property
    def followed(self) -> list[Any]:
        """The variables whose gradients are averaged."""
        return [variable for _, variable in self._named]

    def forget(self) -> None:
        """Reset the error-feedback state to that before the first step; call it on all ranks."""
        if not self.transport.has_server:
            super().forget()

    def discard(self) -> None:
        """Leave out the last step, unless it was dropped or left out already."""
        if self._undoable:
            self._undo()

    def _steps_done(self) -> int:
        return int(self.step.numpy())

    def _set_step(self, step: int) -> None:
        self.step.assign(step)

    def _begin(self, gradients: list[Gradient]) -> list[Gradient]:
        """At the first call, make the buckets and compare the ranks' variables and options.

        Returns:
            The gradients in the form that all ranks send; gradients missing here become zeros.
        """
        if not self._opened:
            with tf.init_scope():
                facts = [f"exchange={self.options.exchange!r}"]  # some make groups of ranks next
                facts += [f"variable '{name}' of shape {tuple(v.shape)}" for name, v in self._named]
                require_same_config(self.transport, facts, "guard.variables")
                self._agree([_kind(gradient) for gradient in gradients])
                self._open()
                self._load_everywhere()
                self._compare(self._facts())
            self._opened = True
        return [
            _as_kind(kind, gradient, variable)
            for kind, gradient, (_, variable) in zip(
                self._kinds, gradients, self._named, strict=True
            )
        ]

    def _agree(self, kinds: list[str]) -> None:
        """Decide what to send: each gradient that any rank has, dense if dense on any rank."""
        codes = np.array([_KINDS.index(kind) for kind in kinds], np.uint8)
        everyones = np.stack(self.transport.allgather("kinds", codes)())
        self._kinds = [_KINDS[code] for code in everyones.max(axis=0)]

    def _load_everywhere(self) -> None:
        """Use the loaded state if all ranks can, else start from zero on all ranks."""
        had, problem = self._loaded is not None, ""
        try:
            self._load()
        except ValueError as error:
            problem = str(error)
        fits = np.array([2 if problem else int(had)], np.uint8)
        everyones = {int(part[0]) for part in self.transport.allgather("restored", fits)()}
        if everyones in ({0}, {1}):
            return
        problem = problem or "other ranks could not load theirs"
        if self._must_fit or self.transport.has_server:  # servers open each bucket only once
            raise ValueError(problem)
        warnings.warn(
            f"error-feedback state starts from zero on rank {self.transport.rank}: {problem}; to "
            "keep it, let every rank save and restore its own checkpoint",
            stacklevel=2,
        )
        self._open()
        self._set_step(0)

    def _open(self) -> None:
        options, kinds = self.options, self._kinds
        plans = plan_buckets(
            [pair for pair, kind in zip(self._named, kinds, strict=True) if kind == "dense"],
            options.method,
            dense=lambda _, variable: options.dense(path_of(variable), variable),
            bucket_bytes=options.bucket_bytes,
            device_of=lambda variable: native(variable).device,
            dense_steps=options.dense_steps,
        )
        self._rows = {
            i: self._make_rows(name, variable)
            for i, ((name, variable), kind) in enumerate(zip(self._named, kinds, strict=True))
            if kind == "rows"
        }
        self.buckets = [
            Bucket(plan, self.transport, exchange=options.exchange, seed=options.seed)
            for plan in plans
        ]

    def _make_rows(self, name: str, variable: Any) -> Rows:
        refuse_rows(self.method, path_of(variable))
        if isinstance(self.transport, ServerBridge):
            raise UnsupportedError(
                f"the gradient of '{path_of(variable)}' is tf.IndexedSlices with "
                "exchange='server', expected a dense one, because servers cannot take rows; "
                "pass sparse_as_dense=True"
            )
        return Rows(name, tuple(variable.shape), self.transport)

    def _facts(self) -> list[str]:
        options = self.options
        gradients = ", ".join(
            f"'{name}' {kind}" for (name, _), kind in zip(self._named, self._kinds, strict=True)
        )
        return [
            f"{options.what}, exchange={options.exchange!r}, seed={options.seed}, "
            f"average={options.average}, "
            f"dense_steps={options.dense_steps}, "
            f"sparse_as_dense={options.sparse_as_dense}, step={self._steps_done()}",
            f"gradients of {gradients}",
        ]

    def _compare_in_second_call(self) -> tf.Tensor:
        """Ops that compare all ranks' variables once, after the first update.

        They return True, or raise.
        """
        calls = self._calls.read_value()
        self._calls.assign_add(1)
        variables = [native(variable) for _, variable in self._named]
        return tf.cond(
            tf.equal(calls, 1),
            lambda: in_sync_op(variables, self.transport),
            lambda: tf.constant(True),
        )

    def _densified(self, gradient: Gradient) -> Gradient:
        if isinstance(gradient, tf.IndexedSlices) and self.options.sparse_as_dense:
            return tf.convert_to_tensor(gradient)
        return gradient

    def _scaled(self, mean: tf.IndexedSlices, good: tf.Tensor, dtype: Any) -> tf.IndexedSlices:
        """Averages, or sums, of rows; NaN for a dropped step."""
        factor = 1 if self.options.average else self.transport.size
        values = tf.where(good, mean.values * factor, np.float32(np.nan))
        return tf.IndexedSlices(tf.cast(values, dtype), mean.indices, mean.dense_shape)


_KINDS = "missing", "rows", "dense"


def _kind(gradient: Gradient) -> str:
    if gradient is None:
        return "missing"
    return "rows" if isinstance(gradient, tf.IndexedSlices) else "dense"


def _as_kind(kind: str, gradient: Gradient, variable: Any) -> Gradient:
    """A gradient in the form agreed on at the first call."""
    mine, shape, dtype = _kind(gradient), tuple(variable.shape), native(variable).dtype
    if mine == kind:
        return gradient
    if kind == "missing":
        raise appeared(variable)
    if kind == "dense":
        return tf.zeros(shape, dtype) if mine == "missing" else tf.convert_to_tensor(gradient)
    rows = tf.zeros((0, *shape[1:]), dtype) if mine == "missing" else gradient
    return tf.IndexedSlices(rows, tf.range(tf.shape(rows, tf.int64)[0]), tf.constant(shape))


def appeared(variable: Any) -> UnsupportedError:
    """Error for a gradient that was missing on all ranks at the first call."""
    return UnsupportedError(
        f"got a gradient of '{path_of(variable)}', which had none at the first call, expected "
        "none, as all ranks send the same; pass unconnected_gradients="
        "tf.UnconnectedGradients.ZERO to tape.gradient() from the first call on, or make a "
        "reducer, tape or optimizer for each set of variables that is trained"
    )
