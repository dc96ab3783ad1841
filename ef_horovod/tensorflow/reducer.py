"""`ef.Reducer`: averages gradients over ranks, compressed; what tape and optimizer work with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.channel import ChannelStats
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.tensorflow.checkpoint import Memories
from ef_horovod.tensorflow.engine import Engine, Gradient, Options
from ef_horovod.tensorflow.server_transport import GraphTransport, ServerBridge
from ef_horovod.tensorflow.variables import name_variables, path_of
from ef_horovod.training.choice import choose, wants_server
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    refuse_elastic,
    refuse_process_set,
    require_method,
    small_or_vector,
    warn_of_surprises,
)
from ef_horovod.transports.horovod import next_prefix
from ef_horovod.transports.horovod_tensorflow import open_lasting


class Reducer(tf.Module):
    """Averages the gradients of some variables over all ranks, compressed.

    It holds this rank's error memories, and so has to live as long as the training:
    `tf.train.Checkpoint(model=model, reducer=reducer)` saves them. With a single rank it returns
    the gradients as they are. It works in eager mode and inside `tf.function`, but not inside one
    with `jit_compile=True`.

    If any rank's gradient has a NaN or an infinity, the step is dropped on all ranks: memories stay
    as they were and all ranks get NaNs. `ef.DistributedOptimizer` leaves such steps out.

    Args:
        variables: tf.Variables or Keras variables, the same on all ranks.
        compression: error-feedback method with its compressor, such as EF21(TopK(ratio=0.01)).
        op: `hvd.Average` or `hvd.Sum`.
        dense: `dense(path, variable)` says which variables stay uncompressed (they share one
            allreduce); default `small_or_vector`.
        exchange: "auto", the cheapest one by the cost model, or with a network as in "auto:10gbit"
            and "auto:1gbit,2ms" the cheapest one there, dense sums included; "gather" (any
            compressor), "reduce" (linear ones) or "double_pass" (any compressor, in slices that
            ranks reduce for each other: cost does not grow with them) among Horovod's ranks; or
            "server" in a job that `launch/server` started, which needs no `hvd.init()`, and where
            sparse gradients need `sparse_as_dense`.
        bucket_bytes: variables are packed into buckets of about this many bytes of float32; each
            is compressed as one vector and sent in one collective as soon as its gradients exist.
        seed: of random compressors.
        sparse_as_dense: compress `tf.IndexedSlices` like all others; otherwise their rows are sent
            as they are, each once.
        check_sync: after the first step, compare the ranks' variables by hash and raise if they
            differ.
        discardable: keep the way back before each step, for `discard`; costs a copy of the vectors
            that a method changes in place (two for EF21, none for ErrorFeedback).
        process_set: Horovod process set to average over; default all ranks.
        timeout: seconds that a wait for other ranks may take; default $EF_HOROVOD_TIMEOUT or 300.
        transport: to the servers or the other ranks, if there is one already.

    Raises:
        UnsupportedError: a combination that cannot work, with the way out.
        ValueError: no variables, or one of them twice.

    Example:
        reducer = ef.Reducer(model.trainable_variables, ef.EF21(ef.TopK(ratio=0.01)))
        gradients = reducer.reduce(tape.gradient(loss, model.trainable_variables))
    """

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
        sparse_as_dense: bool = False,
        check_sync: bool = True,
        discardable: bool = False,
        process_set: Any = None,
        timeout: float | None = None,
        transport: GraphTransport | None = None,
    ) -> None:
        check_options("Reducer", **locals())
        super().__init__(name="ef_reducer")
        require_options(compression, op=op, exchange=exchange, process_set=process_set)
        options = Options(
            method=compression,
            average=op == hvd.Average,
            dense=dense,
            exchange=exchange,
            bucket_bytes=bucket_bytes,
            seed=seed,
            sparse_as_dense=sparse_as_dense,
            check_sync=check_sync,
            discardable=discardable,
        )
        named = name_variables(variables)
        self._count, self._discardable = len(named), discardable
        self._engine: Engine | None = None
        self.memories: Memories | None = None
        transport = transport or _open_transport(exchange, process_set, timeout)
        if transport is not None:
            by_path = [(path_of(variable), variable) for _, variable in named]
            warn_of_surprises(by_path, compression, dense, transport.rank)
            self._engine = Engine(named, options, transport)
            # Tracked by checkpoints; the model's variables are not, for they are the model's.
            self.step = self._engine.step
            self.memories = Memories(
                self._engine.state_dict, partial(self._engine.load_state_dict, must_fit=False)
            )

    @property
    def active(self) -> bool:
        """Whether there are other ranks to average with."""
        return self._engine is not None

    @property
    def transport(self) -> GraphTransport | None:
        """To the other workers, whose `rank` and `size` it knows; None with a single rank."""
        return self._engine.transport if self._engine is not None else None

    def reduce(self, gradients: Sequence[Gradient]) -> list[Gradient]:
        """Average gradients over all ranks.

        Args:
            gradients: of the variables, in their order: tensors, `tf.IndexedSlices` or None. What
                no rank has at the first call stays None; what a rank lacks besides counts as
                zeros there, as in PyTorch.

        Returns:
            The averages, `tf.IndexedSlices` where all ranks had those at the first call; NaN if
            some rank's gradients were not finite.

        Raises:
            ConfigMismatchError: ranks have other options or variables; at the first call.
            OutOfSyncError: the ranks' variables differ after the first step (inside a
                `tf.function`, TensorFlow wraps it into one of its own errors).
            UnsupportedError: called where it cannot work, such as inside `jit_compile=True`; a
                gradient of a variable that had none on any rank at the first call.
            ValueError: another number of gradients.
        """
        return self.reduce_scaled(gradients, 1.0)[0]

    @tf.autograph.experimental.do_not_convert  # of no use here, and costs time at every step
    def reduce_scaled(
        self, gradients: Sequence[Gradient], loss_scale: Any
    ) -> tuple[list[Gradient], tf.Tensor]:
        """The same for gradients that are multiplied by a loss scale; memories are not.

        Returns:
            The averages, as scaled as the gradients were, and a bool tensor: whether the step is
            good, or was dropped on all ranks.
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
        """Leave out the step whose averages `reduce` returned last and nobody applied.

        Error-feedback state is as before it; otherwise what the averages lacked would come back in
        the next ones. Call it on all ranks alike, between steps. Averages are the same everywhere,
        so decide by them. It does nothing after a step that was dropped or discarded already.

        Raises:
            UnsupportedError: the reducer is not `discardable`; or a function is being traced, where
                this would happen once and not in each step.

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

    def stats(self) -> list[ChannelStats]:
        """One row for each bucket and a last one with the total; empty with a single rank.

        Bytes, relative compression error of the last step, and seconds spent compressing and
        decompressing (TensorFlow's executor does the waiting). Call it between steps.
        """
        return self._engine.stats() if self._engine is not None else []

    def compression_state_dict(self) -> dict[str, Any]:
        """This rank's error memories by variable, as NumPy arrays; save one file a rank."""
        return self._engine.state_dict() if self._engine is not None else {}

    def checkpoint(self) -> dict[str, Any]:
        """Have the servers write their memories; this rank's, as `compression_state_dict` has them.

        All workers call it after the same step, and save the result with the variables, or a
        checkpoint of TensorFlow's or Keras' own, one file a worker. Without servers there is nobody
        to ask.

        Raises:
            ProtocolError: the servers were started without --checkpoint.
            UnsupportedError: with servers, before the first step.
        """
        return self._engine.checkpoint() if self._engine is not None else {}

    def load_compression_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `compression_state_dict` or `checkpoint` returned on this rank.

        Raises:
            UnsupportedError: with servers, after the first step: they read theirs before it.
            ValueError: another rank, number of ranks, method or model; before the first step, that
                one raises it.
        """
        if self._engine is not None:
            self._engine.load_state_dict(state)


def _open_transport(
    exchange: str, process_set: Any, timeout: float | None
) -> GraphTransport | None:
    """To the other ranks or to the servers; None if there is nobody to average with."""
    if wants_server(exchange):
        return open_servers(timeout)
    process_set = process_set or hvd.global_process_set
    prefix = next_prefix("ef", process_set)  # make reducers in the same order on all ranks
    if process_set.included() and process_set.size() > 1:
        return open_lasting(prefix, process_set, timeout)
    return None


def open_servers(timeout: float | None) -> ServerBridge:
    """To the servers; see `ServerTransport`."""
    from ef_horovod.server.client import ServerTransport

    return ServerBridge(ServerTransport(timeout))


def require_options(
    compression: Any,
    *,
    op: Any = hvd.Average,
    exchange: str = "auto",
    process_set: Any = None,
    **others: Any,
) -> None:
    """Raise for what `ef.Reducer` refuses, before there are variables to make one for.

    Raises:
        UnsupportedError: a combination that cannot work, with the way out.
        TypeError: there is no such option.
        ValueError: no such exchange.
    """
    refuse_elastic()
    check_options("Reducer", exchange=exchange, process_set=process_set, **others)
    known = list(inspect.signature(Reducer.__init__).parameters)[3:]
    for name in others:
        if name not in known:
            raise TypeError(
                f"got an option {name!r}, expected one of ef.Reducer's: {', '.join(known)}"
            )
    if op not in (hvd.Average, hvd.Sum):
        raise UnsupportedError(
            f"got op={op!r}, expected hvd.Average or hvd.Sum, for Adasum combines dense vectors; "
            "use hvd.DistributedGradientTape without compression for it"
        )
    if wants_server(exchange):
        refuse_process_set(process_set)
    choose(exchange, require_method(compression))


def meaning_of(variables: list[Any], compression: Method, **options: Any) -> dict[str, Any]:
    """What a reducer's arguments come to: equal for two reducers that would do the same.

    Args:
        variables: in the reducer's order.
        compression: see `Reducer`.
        options: likewise; those that are left out have their defaults. Of `dense` its decisions
            count, not the function.
    """
    bound = inspect.signature(Reducer).bind(variables, compression, **options)
    bound.apply_defaults()
    meaning = dict(bound.arguments)
    dense = meaning["dense"]
    meaning["dense"] = tuple(bool(dense(path_of(v), v)) for v in meaning.pop("variables"))
    return meaning
