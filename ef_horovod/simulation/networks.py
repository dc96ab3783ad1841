"""Networks that carry the messages of simulated workers and count bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ef_horovod import wire
from ef_horovod.arrays import Array
from ef_horovod.compressors.base import Payload
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.registry import EXCHANGES
from ef_horovod.methods.base import Method
from ef_horovod.training.choice import choose, wants_server
from ef_horovod.transports.base import Transport, ring_share
from ef_horovod.transports.local import local_group


def network_of(
    method: Method, exchange: str, workers: int, transport: Transport | None
) -> ServerNetwork | PeerNetwork | RankNetwork:
    """The network for an exchange.

    Raises:
        UnsupportedError: a server over a transport, or an exchange that does not fit the method.
        ValueError: no such exchange, or fewer workers than ranks.
    """
    if wants_server(exchange):
        if transport is not None:
            raise UnsupportedError(
                "got exchange='server' with a transport, expected none, for its ranks talk among "
                "each other; leave transport= out, or start a job by launch/server"
            )
        return ServerNetwork(workers)
    kind = choose(exchange, method)
    kind = kind if kind.compresses else EXCHANGES["reduce"]  # the same sum, of payloads
    if transport is None:
        return PeerNetwork(kind, method.fixed_size, workers)
    return RankNetwork(kind, method.fixed_size, workers, transport)


class PeerNetwork:
    """Workers without a server, connected by an exchange."""

    def __init__(self, kind: Exchange, fixed_size: bool, workers: int) -> None:
        self._kind, self._fixed_size = kind, fixed_size
        self._endpoints = local_group(workers)
        self.mine = range(workers)

    def meet(self, messages: Sequence[Payload]) -> list[Payload]:
        """The messages that every worker receives."""
        waits = [
            self._kind.send(endpoint, "step", message, fixed_size=self._fixed_size)
            for endpoint, message in zip(self._endpoints, messages, strict=True)
        ]
        return waits[0]()

    def answer(self, aggregate: Array | Payload) -> None:
        """Does nothing, because every worker aggregates itself."""

    @property
    def bytes_sent(self) -> int:
        return sum(end.bytes_sent for end in self._endpoints) // len(self._endpoints)

    @property
    def bytes_received(self) -> int:
        return self.bytes_sent  # mean over workers: every byte sent reaches another worker


class ServerNetwork:
    """Workers and a parameter server on a separate machine."""

    def __init__(self, workers: int) -> None:
        self._workers = len(local_group(workers))  # raises if less than 1
        self.mine = range(workers)
        self._up = 0  # by all workers
        self.bytes_received = 0

    def meet(self, messages: Sequence[Payload]) -> list[Payload]:
        """The messages that the server receives."""
        self._up += sum(message.nbytes for message in messages)
        return list(messages)

    def answer(self, aggregate: Array | Payload) -> None:
        """Count the answer to each worker: a payload, or plain float32 numbers."""
        if isinstance(aggregate, Payload):
            self.bytes_received += aggregate.nbytes
        else:
            self.bytes_received += 4 * aggregate.shape[0]

    @property
    def bytes_sent(self) -> int:
        return self._up // self._workers


class RankNetwork:
    """Workers spread evenly over the ranks of an MPI job, in rank order.

    Counts per rank differ by at most 1. A rank sends the messages of its workers as one.
    """

    def __init__(
        self, kind: Exchange, fixed_size: bool, workers: int, transport: Transport
    ) -> None:
        n, ranks, rank = workers, transport.size, transport.rank
        if n < ranks:
            raise ValueError(
                f"got {n} workers for {ranks} ranks, expected at least as many; start fewer ranks"
            )
        self._kind, self._fixed_size, self._workers, self._transport = (
            kind,
            fixed_size,
            n,
            transport,
        )
        self._own = 0  # bytes sent by this rank here; the transport may have other users
        self._as_if = 0  # bytes sent by all workers, if each had its own rank
        self.mine = range(rank * n // ranks, (rank + 1) * n // ranks)

    def meet(self, messages: Sequence[Payload]) -> list[Payload]:
        """The messages that every rank receives."""
        if not self._kind.sums and self._workers > self._transport.size:
            received = self._gather(messages)
            sizes = [m.nbytes if self._fixed_size else wire.padded(m.data).size for m in received]
            self._as_if += sum(sizes) * (self._workers - 1)
            return received
        own, before = self._summed(messages), self._transport.bytes_sent
        received = self._kind.send(self._transport, "step", own, fixed_size=self._fixed_size)()
        self._own += self._transport.bytes_sent - before
        return received

    def _summed(self, messages: Sequence[Payload]) -> Payload:
        """One message for all of this rank's workers."""
        own, *others = messages
        if not self._kind.sums:
            return own
        own = Payload(own.data.copy())
        for message in others:
            own.summands()[:] += message.summands()
        self._as_if += self._workers * ring_share(own.summands().nbytes, self._workers)
        return own.as_skip() if any(message.is_skip for message in messages) else own

    def _gather(self, messages: Sequence[Payload]) -> list[Payload]:
        packed = np.concatenate([message.data for message in messages])
        received = []
        for buffer in self._transport.allgather("step", packed)():
            while buffer.size:
                received.append(Payload.from_start(buffer))
                buffer = buffer[received[-1].nbytes :]
        return received

    def answer(self, aggregate: Array | Payload) -> None:
        """Does nothing, because every rank aggregates itself."""

    @property
    def bytes_sent(self) -> int:
        """By this rank if each rank has one worker; else mean per worker, as if each rank had."""
        if self._workers == self._transport.size:
            return self._own
        return self._as_if // self._workers

    @property
    def bytes_received(self) -> int:
        return self.bytes_sent
