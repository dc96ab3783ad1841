"""`ef.Compression`: any compressor and method through stock `hvd.DistributedGradientTape`.

Horovod passes each gradient to `compress`, allreduces the returned tensor, and passes the result to
`decompress`. Our `compress` sends the real payload by a separate op. Horovod gets a single number
to reduce. The cost against `ef.DistributedGradientTape`: no buckets, so one collective and one
small allreduce per variable.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import horovod.tensorflow as hvd
import tensorflow as tf

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.tensorflow.broadcast import follow
from ef_horovod.tensorflow.buckets import Bucket, receive
from ef_horovod.tensorflow.checkpoint import TrackedState
from ef_horovod.tensorflow.graphs import refuse_xla
from ef_horovod.tensorflow.variables import name_variables, path_of
from ef_horovod.training.buckets import plan_one
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.momentum import refuse_one_rank, require_included
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    refuse_elastic,
    require_method,
    small_or_vector,
    warn_of_surprises,
)
from ef_horovod.transports.horovod import next_prefix
from ef_horovod.transports.horovod_tensorflow import open_lasting


class _UnderWay(NamedTuple):
    place: int
    step: tf.Tensor
    arrived: tf.Tensor
    dtype: tf.DType


class Compression(StepDriver[Bucket], tf.Module):
    """An instance for `compression=` of Horovod's tape, and of its optimizer for tf_keras.

    Horovod passes no names, so gradients are identified by their order. All variables need a dense
    gradient at every step, in the order given here. A missing or sparse gradient raises. If any
    rank's gradient of a variable is not finite, that variable's error-feedback state stays
    unchanged on all ranks and its average is NaN, as with plain Horovod. By contrast,
    `ef.DistributedGradientTape` drops whole steps. `op=hvd.Adasum` is not supported.

    Each variable is compressed by itself: `TopK(0.01)` takes 1 % of each, not the largest 1 % of a
    bucket. EF21 with top-k learns much less per step from that, and may diverge; `ErrorFeedback`
    loses less in longer training (docs/results/learning.md).

    Args:
        method: error-feedback method with its compressor.
        variables: in the order of `tape.gradient(loss, variables)`.
        dense: `dense(path, variable)` says which variables stay uncompressed, or returns a method.
        exchange: "auto", "auto:NETWORK", "gather", "reduce", "double_pass" or
            "hierarchical".
        seed: of random compressors.
        dense_steps: as in `ef.Reducer`.
        process_set: as passed to Horovod.
        timeout: seconds that a wait may take; default $EF_HOROVOD_TIMEOUT or 300.

    Raises:
        UnsupportedError: `method` is not a method, or the job is elastic, with the way out.
        ValueError: there are no variables, or one occurs twice.

    Example:
        compression = ef.Compression(ef.EF21(ef.TopK(0.01)), model.trainable_variables)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    """

    def __init__(
        self,
        method: Method,
        variables: Iterable[Any],
        *,
        dense: DensePolicy = small_or_vector,
        exchange: str = "auto",
        seed: int = 0,
        dense_steps: int = 0,
        process_set: Any = None,
        timeout: float | None = None,
    ) -> None:
        tf.Module.__init__(self, name="ef_compression")
        refuse_elastic()
        check_options("Compression", **locals())
        method = require_method(method)
        named = name_variables(variables)
        prefix = next_prefix("ef.stock", process_set)
        transport = open_lasting(prefix, process_set, timeout)
        refuse_one_rank(method, hvd.size())
        require_included(method, transport.rank >= 0)
        if transport.size > 1:
            by_path = [(path_of(variable), variable) for _, variable in named]
            warn_of_surprises(by_path, method, dense, transport.rank)
        buckets = tuple(
            Bucket(
                plan_one(
                    name,
                    (path_of(variable), variable),
                    method,
                    dense=dense,
                    dense_steps=dense_steps,
                ),
                transport,
                exchange=exchange,
                seed=seed,
            )
            for name, variable in named
        )
        StepDriver.__init__(self, method, transport, buckets)
        # One per variable, so that no gradient waits for another.
        self.steps = [tf.Variable(0, trainable=False, dtype=tf.int64) for _ in buckets]
        self.tracked_state = TrackedState(self.state_dict, self.load_state_dict)
        self._next_place, self._trace = 0, None
        self._config_checked = False
        follow(self)
        self._facts = f"exchange={exchange!r}, seed={seed}, dense_steps={dense_steps}"

    @tf.autograph.experimental.do_not_convert
    def compress(self, tensor: tf.Tensor) -> tuple[tf.Tensor, _UnderWay]:
        """Called by Horovod for each gradient; makes the ops that send it."""
        refuse_xla()
        if not self._config_checked and self.transport.size > 1:
            with tf.init_scope():
                self._compare([self._facts])
            self._config_checked = True
        place = self._place_of(tensor)
        step = self.steps[place].read_value()
        arrived = self.buckets[place].send(step, tf.constant(1.0), [tensor])
        # Horovod needs a tensor to allreduce: a 1, which returns as 1 for Average, n for Sum.
        return tf.ones([1]), _UnderWay(place, step, arrived, tensor.dtype)

    @tf.autograph.experimental.do_not_convert
    def decompress(self, tensor: tf.Tensor, ctx: _UnderWay) -> tf.Tensor:
        """Called by Horovod after `compress`; makes the ops that finish the exchange."""
        # Adam's update of a sum of gradients is that of their mean.
        factor = tf.ones([]) if self.method.makes_updates else tf.round(tensor)[0]
        bucket = self.buckets[ctx.place]
        (direction,), _, _ = receive([bucket], [ctx.arrived], ctx.step, factor, tf.constant(True))
        with tf.control_dependencies([direction]):
            self.steps[ctx.place].assign(ctx.step + 1)
        return tf.cast(direction, ctx.dtype)

    @property
    def followed(self) -> list[Any]:
        """The variables whose gradients are averaged."""
        return [bucket.slots[0].parameter for bucket in self.buckets]

    def _steps_done(self) -> int:
        return int(self.steps[0].numpy())

    def steps_taken(self) -> int:
        """See `StepDriver.steps_taken`; the counters in `steps` count dropped steps too."""
        return self._steps_done() - max(bucket.channel.counters.skipped for bucket in self.buckets)

    def _set_step(self, step: int) -> None:
        for counter in self.steps:
            counter.assign(step)

    def _place_of(self, tensor: tf.Tensor) -> int:
        """The next variable's place; a new trace starts from the first."""
        trace = _outermost_graph()
        if trace is not self._trace:
            self._trace, self._next_place = trace, 0
        self._require_all_dense()
        place = self._next_place % len(self.buckets)
        self._next_place += 1
        variable = self.buckets[place].slots[0].parameter
        if tuple(tensor.shape) != tuple(variable.shape):
            raise UnsupportedError(
                f"got a gradient of shape {tuple(tensor.shape)} as number {place}, expected that "
                f"of '{path_of(variable)}' of shape {tuple(variable.shape)}, because Horovod "
                "passes no names; pass the same variables in the same order here and to "
                "tape.gradient(), all with dense gradients, or take ef.DistributedGradientTape"
            )
        return place

    def _require_all_dense(self) -> None:
        """Raise if Horovod holds back a gradient, because that would shift the places."""
        for i, gradient in enumerate(_horovods_gradients()):
            if not isinstance(gradient, tf.Tensor):
                what = "no gradient" if gradient is None else f"a {type(gradient).__name__}"
                raise UnsupportedError(
                    f"got {what} as number {i} of a step, expected a dense one for each variable, "
                    "because Horovod passes no names; leave that variable out here and in "
                    "tape.gradient(), or take ef.DistributedGradientTape, which sends rows and "
                    "zeros"
                )


def _horovods_gradients() -> Iterable[Any]:
    """The gradients of the current call of Horovod's tape or optimizer."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name.endswith("allreduce_grads") and "grads" in frame.f_locals:
            return frame.f_locals["grads"]
        frame = frame.f_back
    return ()


def _outermost_graph() -> Any:
    """The function being traced, outside of its branches; None in eager mode."""
    graph: Any = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while hasattr(getattr(graph, "outer_graph", None), "captures"):
        graph = graph.outer_graph
    return graph
