"""Exchange "double_pass": each rank is the parameter server of one slice of the vector.

    start      compress each slice separately and send it to its owner (all-to-all)
    reply      the owner reduces its n payloads as a server would: to a vector, or to a payload
               compressed with the slice's own error memory
    commit     all ranks get the answers for all slices (all-gather)

For any number of ranks, a rank sends, receives and decodes about one payload and one answer of the
whole vector. This is DoubleSqueeze without a server: Tang et al. (ICML 2019), in the form of
DeepSpeed's 1-bit Adam. The results equal those of servers whose buckets are the slices.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ef_horovod import wire
from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.base import Payload
from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import NonFiniteError, PayloadError, UnsupportedError
from ef_horovod.exchange.base import Exchange, checked
from ef_horovod.exchange.channel import Channel, Piece
from ef_horovod.exchange.network import Collective, Software, Work
from ef_horovod.exchange.registry import EXCHANGES, register_exchange
from ef_horovod.exchange.traffic import (
    Traffic,
    compressor_of_answers,
    double_pass_traffic,
    fixed_nbytes,
    message_nbytes,
)
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Answer, Measure, Transport

_GRAIN = 8  # elements; so the sign bits of a slice fill whole bytes


@register_exchange
class DoublePass(Exchange):
    """All-to-all of the slices' payloads, then all-gather of the slices' answers."""

    name = "double_pass"
    has_answers = True

    def require_fit(self, method: Method) -> None:
        if not method.sliceable:
            raise UnsupportedError(
                f"got exchange='double_pass' with {method}, expected a method that works on a "
                "slice of a vector as on any other, but this one looks at whole matrices; use "
                "exchange='auto'"
            )

    def open(
        self, name: str, like: Array, method: Method, transport: Transport, *, seed: int = 0
    ) -> Channel:
        return SlicedChannel(name, like, method, transport, self, seed=seed)

    def traffic(self, method: Method, d: int, n: int) -> Traffic:
        part = -(-d // n)
        answer = compressor_of_answers(method) or Identity()  # of a header and numbers
        return double_pass_traffic(message_nbytes(method, part), fixed_nbytes(answer, part), n)

    def work(self, work: Work, n: int) -> tuple[float, float]:
        # A copy into the slices and one out of them, both uncached: two passes each.
        # All ranks' payloads for one slice are as long as one payload for all slices.
        before, after = work.push + 2 * work.copy, work.decode + work.aggregate / n
        return before, after + work.pull + 2 * work.copy

    def collectives(
        self, method: Method, d: int, n: int, moved: Traffic, software: Software
    ) -> list[tuple[Collective, float]]:
        up = (n - 1) * method.compressor.nbytes(-(-d // n))
        return [(software.alltoall, up), (software.allgather, moved.sent - up)]


def cuts(d: int, ranks: int) -> list[tuple[int, int]]:
    """Start and stop of each rank's slice of d elements; lengths differ by at most 8.

    Example:
        >>> cuts(30, 3)
        [(0, 8), (8, 16), (16, 30)]
        >>> cuts(9, 4)
        [(0, 0), (0, 8), (8, 8), (8, 9)]
    """
    grains = -(-d // _GRAIN)
    bounds = [min(grains * j // ranks * _GRAIN, d) for j in range(ranks + 1)]
    return list(pairwise(bounds))


class SlicedChannel(Channel):
    """A channel whose vector is sent in slices, each with its own channel and states.

    The inner channels are those of a job with a server. The server of slice j is rank j, its owner.
    The channels are named "NAME/j"; the draws of random compressors depend on the name.
    """

    def _open(self, seed: int) -> tuple[Any, Any]:
        transport = self._transport
        self._slices = [
            _Slice.open(f"{self.name}/{j}", self, start, stop, seed)
            for j, (start, stop) in enumerate(cuts(self.gradient.shape[0], transport.size))
        ]
        self._own = own = self._slices[transport.rank].channel
        own.server = self.method.init(own.gradient, transport.size)[1]
        self._sent: list[Payload] = []
        self._has_numbers = False  # whether answers are vectors, not payloads
        return None, None  # the slices have the states

    def pieces(self) -> list[Piece]:
        return [Piece(f"slice.{j}.", s.start, s.channel) for j, s in enumerate(self._slices)]

    def start(self, step: int) -> None:
        self._begin()
        with self._timed("seconds_compress"):
            for part in self._slices:
                gradient = self.gradient[part.start : part.stop]
                self._xp.write(part.channel.gradient, 0, gradient)
                part.channel.start(step)
            messages = [Payload(part.loopback.message) for part in self._slices]
            if any(message.is_skip for message in messages):
                messages = [message.as_skip() for message in messages]  # tell every owner
            self._sent = messages
        parts, measure = _travelling(messages, self.method.fixed_size)
        with self._counted():
            self._finish = self._transport.alltoall(self.name, parts, measure)

    def arrived(self) -> bool:
        arrived = self._wait()
        own = self._sent[self._transport.rank]
        ranks = self._transport.members
        self._received = [
            checked(data, rank, own, self.name) for rank, data in zip(ranks, arrived, strict=True)
        ]
        return not any(message.is_skip for message in self._received)

    def keep_undo(self) -> None:
        super().keep_undo()
        for part in self._slices:
            part.channel.keep_undo()

    def undo(self) -> None:
        super().undo()
        for part in self._slices:
            part.channel.undo()

    def reply(self) -> None:
        """Reduce the slice that this rank owns, and send the answer to all ranks."""
        with self._timed("seconds_decompress"):
            try:
                answer = self._own.reduce(self._received)
                self._has_numbers = not isinstance(answer, Payload)
            except NonFiniteError:  # the sum of finite payloads can overflow; then all ranks raise
                answer = Identity().absent(self._own.gradient).as_skip()
        if not isinstance(answer, Payload):
            answer = _as_payload(answer)
        (data,), _ = _travelling([answer], self.method.fixed_size_answers)
        measure = wire.payload_nbytes if self.method.fixed_size_answers else wire.padded_nbytes
        with self._counted():
            self._finish = self._transport.allgather(self.answers, data, measure)

    def commit(self) -> Array:
        """As in `Channel`.

        Raises:
            NonFiniteError: on all ranks, if the sum of one slice was not finite.
        """
        assert self._finish is not None, f"{self.name} has not replied"
        with self._timed("seconds_wait"), self._counted():
            arrived = self._finish()
        self._finish = None
        with self._timed("seconds_decompress"):
            answers = [self._read_answer(j, data) for j, data in enumerate(arrived)]
            for part, answer in zip(self._slices, answers, strict=True):
                # `gradient` is free, because its content has been compressed.
                self._xp.write(self.gradient, part.start, part.take(answer))
        self._received = None
        self._stats.steps += 1
        return self.gradient

    def drop(self) -> None:
        for part in self._slices:
            part.drop()
        super().drop()

    def squared_norms(self) -> tuple[float, float] | None:
        norms = [part.channel.squared_norms() for part in self._slices]
        known = [pair for pair in norms if pair is not None]
        if len(known) < len(norms):
            return None
        return sum(lost for lost, _ in known), sum(whole for _, whole in known)

    def _read_answer(self, rank: int, data: np.ndarray) -> Answer:
        payload = Payload.from_start(data)
        if payload.is_skip:
            raise NonFiniteError(
                f"the messages for slice {rank} of '{self.name}' have no finite sum, expected "
                "finite numbers; lower the learning rate or the loss scale"
            )
        part = self._slices[rank]
        sender = self._transport.members[rank]
        if payload.num_elements != part.stop - part.start:
            raise PayloadError(
                f"rank {sender} answered with {payload} in '{self.name}', expected "
                f"{part.stop - part.start} elements; use the same model on all ranks"
            )
        if self._has_numbers:
            return Answer(numbers=payload.summands())
        return Answer(payload=payload.data)


class _Slice(NamedTuple):
    """A slice of the vector, with its channel and the stand-in for its server."""

    start: int
    stop: int
    channel: Channel
    loopback: _LoopbackServer

    @classmethod
    def open(cls, name: str, whole: Channel, start: int, stop: int, seed: int) -> _Slice:
        """Open a slice of another channel's vector."""
        loopback = _LoopbackServer(whole._transport.rank, whole._transport.size)
        like = whole.gradient[start:stop]
        channel = EXCHANGES["server"].open(name, like, whole.method, loopback, seed=seed)
        return cls(start, stop, channel, loopback)

    def take(self, answer: Answer) -> Array:
        """The slice's aggregated gradient."""
        self.loopback.answer = answer
        self.channel.arrived()
        return self.channel.commit()

    def drop(self) -> None:
        """Drop the step: the slice stays as it was."""
        self.loopback.answer = Answer()
        self.channel.arrived()
        self.channel.drop()


class _LoopbackServer(Transport):
    """In-process stand-in for a server: keeps the payload, returns the given answer."""

    message: np.ndarray
    answer = Answer()

    @property
    def has_server(self) -> bool:
        return True

    def open_bucket(self, name: str, length: int, method: str, seed: int) -> None:
        """Does nothing, because the owner has the same method."""

    def ask(self, name: str, payload: np.ndarray, step: int) -> Callable[[], list[Answer]]:
        self.message = payload
        return lambda: [self.answer]

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        raise NotImplementedError("a slice's channel only asks")

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        raise NotImplementedError("a slice's channel only asks")


def _travelling(
    payloads: list[Payload], fixed_size: bool
) -> tuple[list[np.ndarray], Measure | None]:
    """The bytes to send for payloads, and the `measure` to separate those of other ranks."""
    if fixed_size:
        return [payload.data for payload in payloads], None
    return [wire.padded(payload.data) for payload in payloads], wire.padded_nbytes


def _as_payload(numbers: Array) -> Payload:
    """float32[d] unchanged, including infinities, as a server would send them."""
    values = np.asarray(namespace(numbers).to_host(numbers), "<f4")
    return Identity()._payload((values,), values.size, namespace(values).like(values))
