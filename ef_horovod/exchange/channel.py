"""State machine of one vector: compress, exchange, aggregate, decode. All adapters use it.

A channel belongs to one bucket or parameter. A step has two halves, so that many channels can run
at once, and a bad gradient on any rank drops the whole step on all ranks:

    channel.start(step)            compress channel.gradient and send the payload
    channel.relay()                several ranks on a node: wait for them, send what they have
    channel.arrived()              wait for all ranks; False: some rank asks to drop the step
    channel.agreed()               the same of the ranks of this node
    channel.reply()                if all channels' payloads are good: send the answer, if any
    channel.share()                several ranks on a node: aggregate, send the slice to them
    direction = channel.commit()   or channel.drop(): states are as they were before start

A committed step can still be undone by `channel.undo()`, if `channel.keep_undo()` was called before
`reply`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key, tensor_id
from ef_horovod.compressors.base import Payload
from ef_horovod.errors import NonFiniteError
from ef_horovod.exchange.stats import ChannelStats, Counted, Timed
from ef_horovod.methods.base import Method
from ef_horovod.methods.undo import Undo, Undoer
from ef_horovod.transports.base import Transport

if TYPE_CHECKING:
    from ef_horovod.exchange.base import Exchange


class Piece(NamedTuple):
    """A part of a channel's vector with separate states."""

    name: str  # prefix of the names of its states
    start: int  # offset in the channel's vector
    channel: Channel  # its gradient is as long as the piece


Span = tuple[int, int]  # start and stop in a channel's vector


class _Before(NamedTuple):
    """A channel before a step was committed."""

    worker: Undo | None
    server: Undo | None
    gradient: Array  # the gradient's buffer, which becomes part of the state in some methods


class Channel:
    """Compressed exchange of one float32[d]; `Exchange.open` returns the right kind.

    Args:
        name: equal on all ranks, unique among the channels of a transport.
        like: float32[d]; the channel's arrays are what its framework's `zeros` makes.
        method: error-feedback method.
        transport: to the other ranks.
        exchange: carries the payloads.
        seed: of random compressors; equal on all ranks.

    Raises:
        UnsupportedError: the exchange cannot carry the method's payloads.
    """

    # In steps before this one, floats are summed although the exchange moves bytes later.
    sums_before: int = 0

    def __init__(
        self,
        name: str,
        like: Array,
        method: Method,
        transport: Transport,
        exchange: Exchange,
        *,
        seed: int = 0,
    ) -> None:
        exchange.require_fit(method)
        device = getattr(like, "device", None)
        self.name, self.method, self.exchange = name, method, exchange
        # float32[d], filled by the caller per step; of NumPy also for TensorFlow.
        self.gradient = namespace(like).zeros(like.shape[0], device)
        self._xp, self._device, self._transport = namespace(self.gradient), device, transport
        self._key = Key(int(seed), 0, tensor_id(name), transport.rank, transport.size)
        self.worker, self.server = self._open(seed)
        self._lost = self.gradient  # after a step: its compression error
        self._message: Payload | None = None
        self._pushed: Any = None
        self._finish: Callable[[], Any] | None = None
        self._received: Any = None
        self._spans: Sequence[Span] = ()  # of `measure`, for the next start
        self._gradients: list[tuple[Span, float]] = []  # squared norms at the last start
        self._undoers = Undoer(), Undoer()
        self._undo: _Before | None = None
        self._stats = ChannelStats(name, like.shape[0], repr(method), exchange.name)

    def _open(self, seed: int) -> tuple[Any, Any]:
        """States of the worker and the aggregator, if this channel keeps them."""
        return self.method.init(self.gradient, self._transport.size)

    def forget(self) -> None:
        """Reset the states to those before the first step."""
        self.worker, self.server = self._open(self._key.seed)
        self._message = self._undo = None

    @property
    def refused(self) -> bool:
        """Whether this rank asks to drop the started step: its gradient was not finite."""
        return any(
            piece.channel._message is not None and piece.channel._message.is_skip
            for piece in self.pieces()
        )

    @property
    def sums(self) -> bool:
        """Whether the messages to other workers are summed in flight."""
        return self.exchange.sums

    @property
    def answers(self) -> str:
        """Name of the collective for the answers, if the exchange has them."""
        return f"{self.name}.answers"

    def pieces(self) -> list[Piece]:
        """The parts of the vector with separate states, in order: here a single one."""
        return [Piece("", 0, self)]

    def start(self, step: int) -> None:
        """Compress `gradient` and start the exchange; overwrites `gradient`."""
        self._begin()
        with self._timed("seconds_compress"):
            self._key = self._key._replace(step=step)
            try:
                self._message, self._pushed = self.method.push(
                    self.worker, self.gradient, self._key
                )
            except NonFiniteError:
                self._message = self.method.skip(self.gradient, self._key)
                self._pushed = None
        with self._counted():
            self._finish = self._send(self._message, step)

    def _begin(self) -> None:
        assert self._finish is None, f"{self.name} was started twice"
        self._undo = None
        norm = self._xp.squared_norm
        self._gradients = [(span, norm(self.gradient[slice(*span)])) for span in self._spans]
        self._spans = ()

    def _send(self, message: Payload, step: int) -> Callable[[], Any]:
        """Send this rank's payload; returns a function that waits for the result."""
        fixed_size = self.method.fixed_size
        return self.exchange.send(self._transport, self.name, message, fixed_size=fixed_size)

    def relay(self) -> None:
        """Start the next collective, if the exchange has two before `reply`."""

    def arrived(self) -> bool:
        """Wait for all ranks' payloads; whether all of them are good."""
        self._received = self._wait()
        return not any(message.is_skip for message in self._received)

    def _wait(self) -> Any:
        """Wait for the exchange and return its result."""
        assert self._finish is not None, f"{self.name} was not started"
        with self._timed("seconds_wait"), self._counted():
            received = self._finish()
        self._finish = None
        self._stats.dense_bytes_out += self._transport.dense_nbytes(4 * self._stats.num_elements)
        return received

    def agreed(self) -> bool:
        """Whether the step is good for ranks whose payloads did not reach this one."""
        return True

    def keep_undo(self) -> None:
        """Make this step undoable until the next one starts."""
        method = self.method
        halves = (
            (self.worker, method.pulled_in_place),
            (self.server, method.reduced_in_place),
        )
        worker, server = (
            None if state is None else undoer.before(state, method.scratch, changed)
            for undoer, (state, changed) in zip(self._undoers, halves, strict=True)
        )
        self._undo = _Before(worker, server, self.gradient)

    @property
    def undoable(self) -> bool:
        """Whether the last step was committed and can be undone."""
        return self._undo is not None

    def undo(self) -> None:
        """Undo the last committed step; its aggregated gradients are no longer valid."""
        assert self._undo is not None, f"{self.name} keeps no way back"
        worker, server, self.gradient = self._undo
        self.worker = None if worker is None else worker.restore()
        self.server = None if server is None else server.restore()
        self._undo = self._message = None
        self._stats.steps -= 1
        self._stats.skipped += 1

    def reply(self) -> None:
        """Send the answer that other ranks need to commit, if the exchange has answers."""

    def share(self) -> None:
        """Aggregate and start the last collective, if one comes after aggregation."""

    def commit(self) -> Array:
        """Aggregate and take over the new states.

        Returns:
            The aggregated gradient, float32[d]; read it at once.
        """
        with self._timed("seconds_decompress"):
            direction = self._pull(self._aggregate())
        self._received = self._pushed = None
        self._stats.steps += 1
        return direction

    def _aggregate(self) -> Array | Payload:
        """The aggregate of all ranks' payloads."""
        return self.reduce(self._received)

    def _pull(self, aggregate: Array | Payload) -> Array:
        before = self.worker
        direction, self.worker = self.method.pull(self._pushed, aggregate)
        self._spare(before)
        return direction

    def reduce(self, messages: Sequence[Payload]) -> Array | Payload:
        """The aggregator's part of a step, with this channel's replica of its state."""
        aggregate, self.server = self.method.reduce(self.server, messages, self._key.of_server())
        return aggregate

    def abandon(self) -> None:
        """End what is under way between ranks that are no longer the same, whatever it brings."""
        if self._finish is not None:
            with suppress(Exception):  # Horovod frees what it holds
                self._finish()
        self._finish = None

    def drop(self) -> None:
        """Drop the step: all states stay as they were before `start`."""
        self._received = self._pushed = self._message = self._undo = None
        self._stats.skipped += 1

    @property
    def counters(self) -> ChannelStats:
        """Counters since the start; `stats` also measures the compression error."""
        return self._stats

    def stats(self) -> ChannelStats:
        """Counters since the start, and the compression error of the last step.

        Call it between steps, because the next gradient overwrites the buffer with the error.
        """
        norms = self.squared_norms()
        if norms is not None:
            lost, whole = norms
            self._stats.relative_error = math.sqrt(lost / whole) if whole > 0 else 0.0
        return self._stats

    def squared_norms(self) -> tuple[float, float] | None:
        """||x - C(x)||^2 and ||x||^2 of the last step's compression; None for a dropped step."""
        if self._message is None or self._message.is_skip:
            return None
        xp, lost = self._xp, self._lost
        whole = xp.zeros(lost.shape[0], getattr(lost, "device", None))
        xp.assign(whole, lost)
        self.method.add_message(self.worker, self._message, whole)
        return xp.squared_norm(lost), xp.squared_norm(whole)

    def measure(self, spans: Sequence[Span]) -> None:
        """Let the next `start` take the gradient's norms for `measured`: a pass over memory."""
        self._spans = spans

    def measured(self) -> list[tuple[float, float]]:
        """||x - C(x)||^2 and ||gradient||^2 of the last step in each span of `measure`, in order.

        Empty if `measure` was not called before that step, or if the step was dropped.
        """
        pieces = self.pieces() if self.exchange.compresses else []  # a dense sum loses nothing
        parts = [(piece.start, piece.channel) for piece in pieces]
        if any(part._message is None or part._message.is_skip for _, part in parts):
            return []
        return [
            (sum(part._squared_loss(start - at, stop - at) for at, part in parts), gradient)
            for (start, stop), gradient in self._gradients
        ]

    def _squared_loss(self, start: int, stop: int) -> float:
        """||x - C(x)||^2 of the last step from start to stop, which may lie outside of x."""
        start, stop = max(start, 0), min(stop, self._lost.shape[0])
        return self._xp.squared_norm(self._lost[start:stop]) if start < stop else 0.0

    def _spare(self, before: Any) -> None:
        """If the worker's state took over `gradient`'s buffer, reuse an array that it freed."""
        self._lost = self.gradient
        # Compare addresses, not identity: a residual is often a view of the compressed vector.
        address = self._xp.address
        assert self.worker is not None
        taken = {address(field) for field in self.worker if hasattr(field, "shape")}
        if self.gradient.shape[0] and address(self.gradient) in taken:
            given_up = [x for x in before if hasattr(x, "shape") and address(x) not in taken]
            self.gradient = given_up[0]

    def _timed(self, counter: str) -> Timed:
        return Timed(self._stats, counter)

    def _counted(self) -> Counted:
        return Counted(self._stats, self._transport)


def finish_step(
    channels: list[Channel], *, good: bool = True, undoable: bool = False
) -> list[Array] | None:
    """Wait for all channels, then commit all, or drop all if any rank's gradient was not finite.

    Args:
        channels: the started channels.
        good: False to drop the step in any case; equal on all ranks.
        undoable: whether `Channel.undo` may be called after it.

    Returns:
        The aggregated gradients in the order of the channels, or None for a dropped step. All ranks
        get the same answer, because all of them received the same data.
    """
    return conclude(channels, good=settle(channels, good=good, undoable=undoable))


def settle(channels: list[Channel], *, good: bool = True, undoable: bool = False) -> bool:
    """The first half of `finish_step`: whether the step is good; sends the answers if it is."""
    return agree(channels, good=arrive(channels, good=good), undoable=undoable)


def arrive(channels: list[Channel], *, good: bool = True) -> bool:
    """The first half of `settle`: whether the step is good for this rank."""
    for channel in channels:
        channel.relay()
    arrived = [channel.arrived() for channel in channels]  # wait for all, even after a bad one
    return good and all(arrived)


def agree(channels: list[Channel], *, good: bool, undoable: bool = False) -> bool:
    """The second half of `settle`: whether the step is good for all ranks."""
    agreed = [channel.agreed() for channel in channels]
    good = good and all(agreed)
    if good and undoable:
        for channel in channels:
            channel.keep_undo()
    if good:  # only now, because a reply changes the aggregator's state
        for channel in channels:
            channel.reply()
    return good


def conclude(channels: list[Channel], *, good: bool) -> list[Array] | None:
    """The second half: commit all channels of a good step, or drop it."""
    if good:
        for channel in channels:
            channel.share()
        return [channel.commit() for channel in channels]
    for channel in channels:
        channel.drop()
    return None
