"""`ef.Reducer`: averages gradients over ranks, compressed; used by tape and optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import horovod.tensorflow as hvd
import tensorflow as tf

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.tensorflow.checkpoint import TrackedState
from ef_horovod.tensorflow.engine import Engine, Gradient
from ef_horovod.tensorflow.options import Options, ReducerOptions, require_options
from ef_horovod.tensorflow.server_transport import GraphTransport, ServerBridge
from ef_horovod.tensorflow.variables import name_variables, path_of
from ef_horovod.training.choice import wants_server
from ef_horovod.training.momentum import for_one_rank, require_included
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    method_of,
    require_answers,
    small_or_vector,
    warn_of_surprises,
)
from ef_horovod.transports.horovod import next_prefix
from ef_horovod.transports.horovod_tensorflow import open_lasting

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Reducer(tf.Module):
    """Averages the gradients of some variables over all ranks, compressed.

    It holds this rank's error-feedback state, so keep it for the whole training.
    `tf.train.Checkpoint(model=model, reducer=reducer)` saves the state. With a single rank it
    returns the gradients unchanged, or with the momentum of `MomentumCorrection`; apply these with
    an optimizer that has none. It works in eager mode and inside `tf.function`, but not with
    `jit_compile=True`.

    If any rank's gradient has a NaN or an infinity, the step is dropped on all ranks: the
    error-feedback state stays unchanged and all ranks get NaNs. `ef.DistributedOptimizer` leaves
    such steps out.

    Args:
        variables: tf.Variables or Keras variables, the same on all ranks.
        compression: error-feedback method with its compressor, such as EF21(TopK(ratio=0.01)).
        op: `hvd.Average` or `hvd.Sum`.
        dense: `dense(path, variable)` says which variables stay uncompressed (they share one
            allreduce); default `small_or_vector`. A method that it returns is that variable's own;
            see also `ef.by_name`, `ef.dense_below` and `ef.dense_unless_smaller`.
        exchange: "auto" takes the cheapest exchange by the cost model. "auto:NETWORK", such as
            "auto:10gbit" or "auto:1gbit,2ms", takes the cheapest on that network, dense allreduce
            included. "gather" works with any compressor, "reduce" with linear ones. "double_pass"
            works with any compressor; each rank reduces one slice, so the cost does not grow with
            the number of ranks. "hierarchical" sums within a node of several ranks first; it needs
            hvd.init(process_sets="dynamic"). "server" is for a job started by `launch/server`,
            without `hvd.init()`; sparse gradients need `sparse_as_dense` there. With
            "hierarchical:server" the workers of a node sum first.
        bucket_bytes: variables are packed into buckets of about this many bytes of float32. Each
            is compressed as one vector and sent in one collective as soon as its gradients exist.
        seed: of random compressors.
        dense_steps: number of first steps that send uncompressed averages. Error feedback then
            starts from zero, and `MomentumCorrection` from its momentum.
        sparse_as_dense: compress `tf.IndexedSlices` like all others. Otherwise their rows are sent
            uncompressed, each once.
        check_sync: after the first step, compare the ranks' variables by hash and raise if they
            differ.
        discardable: keep the state from before each step, for `discard`. Costs a copy of the
            vectors that a method changes in place (two for EF21, none for ErrorFeedback).
        process_set: Horovod process set to average over; default all ranks.
        timeout: seconds that a wait for other ranks may take; default $EF_HOROVOD_TIMEOUT or 300.
        transport: an existing one to the servers or the other ranks.

    Raises:
        UnsupportedError: the combination cannot work; the message names an alternative.
        ValueError: there are no variables, or one occurs twice.

    Example:
        reducer = ef.Reducer(model.trainable_variables, ef.EF21(ef.TopK(ratio=0.01)))
        gradients = reducer.reduce(tape.gradient(loss, model.trainable_variables))
    """

    _what = "gradients"

    def __init__(
        self,
        variables: Iterable[Any],
        compression: Method = NoFeedback(Identity()),  # noqa: B008 - frozen
        *,
        op: Any = hvd.Average,
        dense: DensePolicy = small_or_vector,
        exchange: str = "auto",
        bucket_bytes: int = 25 * 2**20,
        seed: int = 0,
        dense_steps: int = 0,
        sparse_as_dense: bool = False,
        check_sync: bool = True,
        discardable: bool = False,
        process_set: Any = None,
        timeout: float | None = None,
        transport: GraphTransport | None = None,
    ) -> None:
        check_options("Reducer", **locals())
        super().__init__(name="ef_reducer")
        require_options(
            compression,
            op=op,
            exchange=exchange,
            process_set=process_set,
            dense_steps=dense_steps,
        )
        named = name_variables(variables)
        by_path = [(path_of(variable), variable) for _, variable in named]
        require_answers(by_path, dense, compression)
        transport = transport or _open_transport(exchange, process_set, timeout, compression)
        if transport is not None and transport.size == 1 and not transport.has_server:
            (compression, dense), exchange = for_one_rank(compression, dense), "auto"
        options = Options(
            method=compression,
            # Adam's update of a sum of gradients is that of their mean.
            average=op == hvd.Average or compression.makes_updates,
            dense=dense,
            exchange=exchange,
            bucket_bytes=bucket_bytes,
            seed=seed,
            dense_steps=dense_steps,
            sparse_as_dense=sparse_as_dense,
            check_sync=check_sync,
            discardable=discardable,
            what=self._what,
        )
        self._count, self._discardable = len(named), discardable
        self.outside = process_set is not None and not process_set.included()
        self._engine: Engine | None = None
        self.tracked_state: TrackedState | None = None
        if transport is not None:
            if transport.size > 1:
                warn_of_surprises(by_path, compression, dense, transport.rank)
            self._engine = self._make_engine(named, options, transport)
            # Tracked by checkpoints, unlike the model's variables.
            self.step = self._engine.step
            self.tracked_state = TrackedState(
                self._engine.state_dict, partial(self._engine.load_state_dict, must_fit=False)
            )

    def _make_engine(
        self, named: list[tuple[str, Any]], options: Options, transport: GraphTransport
    ) -> Engine:
        return Engine(named, options, transport)

    @property
    def active(self) -> bool:
        """Whether gradients are exchanged, or get a method's momentum on a single rank."""
        return self._engine is not None

    @property
    def transport(self) -> GraphTransport | None:
        """Transport to the other workers, with `rank` and `size`; None with a single rank."""
        return self._engine.transport if self._engine is not None else None

    def reduce(self, gradients: Sequence[Gradient]) -> list[Gradient]:
        """Average gradients over all ranks.

        Args:
            gradients: of the variables, in their order: tensors, `tf.IndexedSlices` or None. A
                gradient that no rank has at the first call stays None. Any other missing gradient
                counts as zeros, as in PyTorch.

        Returns:
            The averages; `tf.IndexedSlices` if all ranks had those at the first call; NaN if some
            rank's gradients were not finite.

        Raises:
            ConfigMismatchError: at the first call, if options or variables differ between ranks.
            OutOfSyncError: the ranks' variables differ after the first step (inside a
                `tf.function`, TensorFlow wraps it into one of its errors).
            UnsupportedError: the call cannot work here, such as inside `jit_compile=True`; or a
                variable has a gradient that had none on any rank at the first call.
            ValueError: the number of gradients is wrong.
        """
        return self.reduce_scaled(gradients, 1.0)[0]

    @tf.autograph.experimental.do_not_convert  # AutoGraph is useless here and costs time per step
    def reduce_scaled(
        self, gradients: Sequence[Gradient], loss_scale: Any
    ) -> tuple[list[Gradient], tf.Tensor]:
        """The same for gradients multiplied by a loss scale; error-feedback state is unscaled.

        Returns:
            The averages, scaled like the gradients, and a bool tensor: True if the step is good,
            False if it was dropped on all ranks.
        """
        gradients = list(gradients)
        if len(gradients) != self._count:
            raise ValueError(
                f"got {len(gradients)} gradients, expected one for each of the {self._count} "
                "variables; pass them in the order of the variables, with None where there is none"
            )
        if self._engine is None:
            return gradients, tf.constant(True)
        return self._engine.reduce(gradients, tf.cast(loss_scale, tf.float32))

    def discard(self) -> None:
        """Leave out the last step of `reduce`, whose averages were not applied.

        Restores the error-feedback state from before that step. Otherwise the step's compression
        error would come back in the next averages. Call it on all ranks, between steps. Averages
        are equal on all ranks, so decide by them. It does nothing after a step that was dropped or
        discarded already.

        Raises:
            UnsupportedError: the reducer is not `discardable`; or a function is being traced, where
                it would run only once, not in each step.

        Example:
            reducer = ef.Reducer(variables, ef.EF21(ef.TopK(ratio=0.01)), discardable=True)
            averages = reducer.reduce(gradients)
            if tf.linalg.global_norm(averages) > 100:
                reducer.discard()
            else:
                optimizer.apply(averages, variables)
        """
        if not self._discardable:
            raise UnsupportedError(
                "got discard() of a reducer that keeps no way back, expected one that does; pass "
                "discardable=True to ef.Reducer()"
            )
        if not tf.executing_eagerly():
            raise UnsupportedError(
                "got discard() inside a tf.function, expected it between two steps; return the "
                "averages from the function and decide outside of it"
            )
        if self._engine is not None:
            self._engine.discard()

    @property
    def drivers(self) -> list[Engine]:
        """For `ef.TrainingLog`."""
        return [] if self._engine is None else [self._engine]

    def stats(self) -> list[ChannelStats]:
        """One row per bucket, then the total; empty with a single rank.

        A row has bytes, the relative compression error of the last step, and seconds spent
        compressing and decompressing (TensorFlow's executor does the waiting). Call it between
        steps.
        """
        return self._engine.stats() if self._engine is not None else []

    def compression_state_dict(self) -> dict[str, Any]:
        """This rank's error-feedback state by variable, as NumPy arrays; one file per rank."""
        return self._engine.state_dict() if self._engine is not None else {}

    def merged_state_dict(self) -> dict[str, Any]:
        """State of all ranks together, for `ef.save`; collective. Empty with a single rank."""
        return self._engine.merged_state_dict() if self._engine is not None else {}

    def checkpoint(self) -> dict[str, Any]:
        """Make the servers save their state; return this rank's `compression_state_dict()`.

        All workers call it after the same step. Each saves the result with the variables, or a
        checkpoint of TensorFlow or Keras, one file per worker. Without servers it only returns the
        state.

        Raises:
            ProtocolError: the servers were started without --checkpoint.
            UnsupportedError: with servers, before the first step.
        """
        return self._engine.checkpoint() if self._engine is not None else {}

    def load_compression_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `compression_state_dict` or `checkpoint` of this rank.

        Raises:
            UnsupportedError: with servers, after the first step; servers load their state before.
            ValueError: the rank, number of ranks, method or model differs. If called before the
                first step, that step raises it.
        """
        if self._engine is not None:
            self._engine.load_state_dict(state)


def _open_transport(
    exchange: str, process_set: Any, timeout: float | None, method: Method
) -> GraphTransport | None:
    """Transport to the other ranks or the servers; None where plain gradients are enough."""
    if wants_server(exchange):
        return open_servers(timeout)
    process_set = process_set or hvd.global_process_set
    prefix = next_prefix("ef", process_set)  # make reducers in the same order on all ranks
    require_included(method, process_set.included())
    if process_set.included() and (method.replaces_optimizer or process_set.size() > 1):
        return open_lasting(prefix, process_set, timeout)
    return None


def open_servers(timeout: float | None) -> ServerBridge:
    """Transport to the servers; see `ServerTransport`."""
    from ef_horovod.server.client import ServerTransport

    return ServerBridge(ServerTransport(timeout))


def meaning_of(
    variables: list[Any], compression: Method, **options: Unpack[ReducerOptions]
) -> dict[str, Any]:
    """A reducer's arguments in a normal form: equal for two reducers that would do the same.

    Args:
        variables: in the reducer's order.
        compression: see `Reducer`.
        options: see `Reducer`; defaults are filled in. `dense` is replaced by its decisions.
    """
    bound = inspect.signature(Reducer).bind(variables, compression, **options)
    bound.apply_defaults()
    meaning = dict(bound.arguments)
    dense = meaning["dense"]
    meaning["dense"] = tuple(
        method_of(dense, path_of(v), v, compression) for v in meaning.pop("variables")
    )
    return meaning
