"""Endpoints of simulated workers: at a simulated server, and on the ranks of an MPI job."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key, tensor_id
from ef_horovod.compressors.base import Payload
from ef_horovod.errors import NonFiniteError
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Answer, Measure, Transport, split
from ef_horovod.transports.local import LocalTransport, Mailbox


class ServedWorker(LocalTransport):
    """A worker's endpoint at a simulated server, which has a machine of its own."""

    @classmethod
    def group(
        cls, method: Method, x: Array, workers: int, *, seed: int, name: str
    ) -> list[LocalTransport]:
        """The endpoints of all workers; arguments as in `SimulatedWorkers`."""
        server = _Server(method, x, Key(seed, 0, tensor_id(name), 0, workers))
        mailbox = Mailbox(range(workers), one_thread=True)
        return [cls(rank, workers, mailbox, server) for rank in range(workers)]

    def __init__(self, rank: int, size: int, mailbox: Mailbox, server: _Server) -> None:
        super().__init__(rank, size, mailbox)
        self._server = server

    @property
    def has_server(self) -> bool:
        return True

    def open_bucket(self, name: str, length: int, method: str, seed: int) -> None:
        """Does nothing, because the server has the same method."""

    def ask(self, name: str, payload: np.ndarray, step: int) -> Callable[[], list[Answer]]:
        def answered(payloads: list[np.ndarray]) -> Answer:
            return self._server.answer(payloads, step)

        collect = self._deposit(f"ask.{name}", payload, answered)
        self.bytes_sent += payload.size

        def finish() -> list[Answer]:
            answer = collect()
            said = answer.numbers if answer.payload is None else answer.payload
            self.bytes_received += 0 if said is None else said.nbytes
            return [answer]

        return finish


class _Server:
    """The aggregator of one vector."""

    def __init__(self, method: Method, x: Array, key: Key) -> None:
        self._method, self._key = method, key
        self._state = method.init(x, key.workers)[1]

    def answer(self, payloads: list[np.ndarray], step: int) -> Answer:
        """The answer to the payloads of all workers; an empty one if they have no finite sum."""
        messages = [Payload(data) for data in payloads]
        key = self._key._replace(step=step).of_server()
        try:
            if any(message.is_skip for message in messages):
                return Answer()
            aggregate, self._state = self._method.reduce(self._state, messages, key)
        except NonFiniteError:
            return Answer()
        if isinstance(aggregate, Payload):
            return Answer(payload=aggregate.data)
        return Answer(numbers=namespace(aggregate).to_host(aggregate))


class RankWorker(LocalTransport):
    """A worker's endpoint on a rank that it shares with others, whose messages travel as one."""

    alltoall = Transport.alltoall  # which raises

    @classmethod
    def group(cls, rank_transport: Transport, workers: int) -> list[LocalTransport]:
        """The endpoints of this rank's workers.

        Workers are spread evenly over the ranks, in rank order; counts differ by at most 1.

        Raises:
            ValueError: fewer workers than ranks.
        """
        if workers < rank_transport.size:
            raise ValueError(
                f"got {workers} workers for {rank_transport.size} ranks, expected at least as "
                "many; start fewer ranks"
            )
        own = _share(workers, rank_transport.size, rank_transport.rank)
        mailbox = Mailbox(own, one_thread=True)
        return [cls(worker, workers, mailbox, rank_transport) for worker in own]

    def __init__(self, rank: int, size: int, mailbox: Mailbox, rank_transport: Transport) -> None:
        super().__init__(rank, size, mailbox)
        self._rank_transport = rank_transport

    def _gathered(
        self, name: str, parts: list[np.ndarray], measure: Measure | None
    ) -> list[np.ndarray]:
        ranks = self._rank_transport.size
        # The length of several workers' buffers together cannot be measured without their number.
        measure_all = measure if ranks == self.size else None
        together = np.concatenate(parts)
        received: list[np.ndarray] = []
        for rank, data in enumerate(
            self._rank_transport.allgather(f"allgather.{name}", together, measure_all)()
        ):
            count = len(_share(self.size, ranks, rank))
            received += split(name, data, data.size // count, count, measure)
        return received

    def _sum(self, name: str, parts: list[np.ndarray]) -> np.ndarray:
        return self._rank_transport.allreduce(f"allreduce.{name}", super()._sum(name, parts))()


def _share(workers: int, ranks: int, rank: int) -> range:
    """The workers of a rank."""
    return range(rank * workers // ranks, (rank + 1) * workers // ranks)
