"""`Worker`: gradients in NumPy arrays, averaged by the servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ef_horovod.arrays import float_namespace
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.channel import Channel
from ef_horovod.methods.base import Method
from ef_horovod.server.client import ServerTransport
from ef_horovod.server.link import in_words
from ef_horovod.training.buckets import BucketPlan, Slot, plan_buckets
from ef_horovod.training.choice import choose, wants_server
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    require_distinct,
    require_method,
    small_or_vector,
)

Named = Mapping[str, np.ndarray]
Listed = Sequence[np.ndarray]


class Worker(StepDriver["_Bucket"]):
    """One worker rank of a job with parameter servers.

    Make it on all workers with the same arguments, after servers and workers have started.

    Args:
        parameters: {name: array}, or a list of arrays, named "0", "1", ...; only their shapes
            matter.
        compression: error-feedback method with its compressor.
        dense: `dense(name, array)` says which parameters stay uncompressed, or returns a method
            for one; default biases and parameters with fewer than 1024 elements.
        bucket_bytes: parameters are packed into buckets of about this many bytes of float32, last
            one first. A bucket is compressed as one vector and belongs to one server.
        seed: of random compressors.
        exchange: "server", or "hierarchical:server": the workers of a node sum their gradients
            first, so that servers hear one worker per node.
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.
        state: result of `checkpoint` on this rank of an equal job, to continue there, bitwise as
            if it had not been interrupted. The servers continue from their files of the same step.
        transport: an existing one to the servers.

    Raises:
        ConfigMismatchError: workers or servers have another model or compression.
        CollectiveTimeoutError: ranks are missing; the message names them.
        UnsupportedError: `compression` is not a method, does not go with the exchange, or the job
            has no server.
        ValueError: there are no parameters, one occurs twice, or `exchange` is without servers.

    Example:
        worker = Worker({"w": w}, ef.EF21(ef.TopK(ratio=0.01)))
        for x, y in batches:
            directions = worker.push_pull({"w": gradient(w, x, y)})
            w -= 0.1 * directions["w"]
    """

    def __init__(
        self,
        parameters: Named | Listed,
        compression: Method,
        *,
        dense: DensePolicy = small_or_vector,
        bucket_bytes: int = 25 * 2**20,
        seed: int = 0,
        exchange: str = "server",
        timeout: float | None = None,
        state: dict[str, Any] | None = None,
        transport: ServerTransport | None = None,
    ) -> None:
        method = require_method(compression)
        check_options("Worker", **locals())
        self._named = isinstance(parameters, Mapping)
        for name, parameter in _items(parameters):
            float_namespace(parameter, f"parameter '{name}'")
        named = require_distinct(list(_items(parameters)))
        if not named:
            raise ValueError("got no parameters, expected at least one array to send gradients of")
        plans = plan_buckets(
            named, method, dense=dense, bucket_bytes=bucket_bytes, device_of=lambda _: None
        )
        if not wants_server(exchange):
            raise ValueError(
                f"Worker got exchange={exchange!r}, expected 'server' or 'hierarchical:server'; "
                "leave it out for 'server'"
            )
        choose(exchange, method)
        transport = transport or ServerTransport(timeout)
        buckets = [_Bucket(plan, transport, exchange, seed) for plan in plans]
        super().__init__(method, transport, buckets)
        self.transport: ServerTransport = transport
        self._place = {slot.name: (b, slot) for b in self.buckets for slot in b.slots}
        self._order = [name for name, _ in named]
        if state is not None:
            self.load_state_dict(state)
        shapes = [f"parameter '{name}' of shape {tuple(array.shape)}" for name, array in named]
        self.transport.handshake(shapes, self.step, several_rounds=True)

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self.transport.rank

    @property
    def size(self) -> int:
        """Number of workers."""
        return self.transport.size

    def push_pull(self, gradients: Named | Listed) -> Any:
        """Send this worker's gradients and wait for the aggregated gradient.

        Args:
            gradients: of all parameters, in the form of `parameters`, any float dtype.

        Returns:
            The aggregated gradient as float32 arrays in the same form, to use instead of the mean
            gradient. Read-only, and valid until the next call. None if some worker's gradient had a
            NaN or an infinity: the step is then dropped on all ranks, and all error-feedback state
            is unchanged.

        Raises:
            ServerError, CollectiveTimeoutError: the job has ended; the message says why.
            UnsupportedError: this worker is closed, or the server's rounds do not wait for all
                workers; use `rounds` then.
            ValueError: names or shapes are not those of the parameters.
        """
        self.transport.require_open()
        if self.transport.quorum is not None:
            raise UnsupportedError(
                f"push_pull() got a server with a quorum of {self.transport.quorum}, expected one "
                "that waits for all workers; write `for directions in worker.rounds(gradients)`"
            )
        for name, gradient in _items(gradients):
            self.push(name, gradient)
        return self.pull()

    def rounds(self, gradients: Named | Listed) -> list[Any]:
        """`push_pull` for servers with a quorum: aggregated gradients of one or several rounds.

        They include rounds that this worker was late for; its gradients count in one round. All
        workers apply the same rounds in the same order, at different times. `step` counts rounds,
        so `while worker.step < steps` ends all workers at about the same round. A gradient that is
        not finite is left out, per bucket, and the error-feedback state is unchanged.
        """
        self.transport.require_open()
        if self.transport.quorum is None:
            directions = self.push_pull(gradients)
            return [] if directions is None else [directions]
        for name, gradient in _items(gradients):
            self.push(name, gradient)
        self._begin_pull()
        found = self._finish_rounds()
        self.step += len(found)
        return [self._in_form(directions) for directions in found]

    def push(self, name: str, gradient: np.ndarray) -> None:
        """Add one gradient; its bucket is sent as soon as it is full.

        Raises:
            ValueError: there is no such parameter, the shape differs, or it is a duplicate in this
                step.
            TypeError: the gradient is complex or masked.
        """
        self.transport.require_open()
        bucket, slot = self._place.get(name, (None, None))
        if bucket is None or slot is None or slot.parameter.shape != np.shape(gradient):
            expected = f"one of {self._order[:8]}" if slot is None else f"{slot.parameter.shape}"
            raise ValueError(
                f"got a gradient '{name}' of shape {np.shape(gradient)}, expected {expected}; "
                "name gradients as the parameters"
            )
        if name in bucket.filled:
            raise ValueError(
                f"got the gradient '{name}' twice in a step, expected it once; call pull() before"
            )
        if not hasattr(gradient, "dtype"):
            gradient = np.asarray(gradient)  # a list of numbers
        float_namespace(gradient, f"a gradient '{name}'")
        bucket.channel.gradient[slot.start : slot.stop] = np.reshape(gradient, -1)
        bucket.filled.add(name)
        if len(bucket.filled) == len(bucket.slots):
            bucket.channel.start(self.step)

    def pull(self) -> Any:
        """Wait for the aggregated gradient of all pushed gradients; see `push_pull`."""
        self._begin_pull()
        directions = self._finish()
        return None if directions is None else self._in_form(directions)

    def _begin_pull(self) -> None:
        self.transport.require_open()
        missing = [name for name, (b, _) in self._place.items() if name not in b.filled]
        if missing:
            raise ValueError(
                f"got no gradient of {missing[:8]} in this step, expected all parameters'; push "
                "zeros for those without one"
            )
        for bucket in self.buckets:
            bucket.filled.clear()

    def _in_form(self, directions: list[np.ndarray]) -> Any:
        """Split the buckets' aggregated gradients by parameter."""
        parts = {}
        for bucket, direction in zip(self.buckets, directions, strict=True):
            for slot in bucket.slots:
                part = direction[slot.start : slot.stop].reshape(slot.parameter.shape)
                part.flags.writeable = False  # it may be a view of error-feedback state
                parts[slot.name] = part
        ordered = {name: parts[name] for name in self._order}
        return ordered if self._named else list(ordered.values())

    def close(self) -> None:
        """End this worker, after its last step; done automatically at the end of the process."""
        self.transport.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.transport.close(in_words(error))


class _Bucket:
    """Parameters that are sent together, and their channel."""

    def __init__(
        self, plan: BucketPlan, transport: ServerTransport, exchange: str, seed: int
    ) -> None:
        like = np.empty(plan.length, np.float32)
        self.channel: Channel = plan.open(like, transport, exchange=exchange, seed=seed)
        self.slots: list[Slot] = plan.slots
        self.filled: set[str] = set()


def _items(arrays: Named | Listed) -> list[tuple[str, Any]]:
    if isinstance(arrays, Mapping):
        return list(arrays.items())
    return [(str(i), array) for i, array in enumerate(arrays)]
