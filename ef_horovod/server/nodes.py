"""Several workers on a node: they sum among themselves, and servers hear one worker per node.

The groups are made at the start, when all workers are known to be there. So an exchange that needs
them is not collective when it is opened, and servers can name a worker with another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.errors import UnsupportedError
from ef_horovod.transports.base import Answer, Measure, Transport
from ef_horovod.transports.mpi import MPITransport
from ef_horovod.transports.nodes import Groups, Levels

if TYPE_CHECKING:
    from ef_horovod.server.client import ServerTransport

T = TypeVar("T")


def levels_by(groups: Groups, workers: ServerTransport, comm: Any) -> Levels:
    """A worker's transports to its node, and to the servers; collective over all workers.

    Args:
        groups: of the workers.
        workers: this worker's transport to the servers.
        comm: of the workers.
    """
    own = next(group for group in groups.nodes if workers.rank in group)
    here = comm.Split(groups.nodes.index(own), workers.rank)
    node = WithinNode(here, own, workers)
    here.Free()
    slice_of = next((group for group in groups.cross if workers.rank in group), None)
    cross = None if slice_of is None else OfNode(slice_of, workers)
    return Levels(node, cross, len(groups.cross), workers.size / len(groups.nodes))


class WithinNode(MPITransport):
    """The workers of a node. A wait among them also ends when a server ends the job.

    Args:
        comm: of these workers.
        members: their numbers in the job.
        workers: this worker's transport to the servers.
    """

    def __init__(self, comm: Any, members: Sequence[int], workers: ServerTransport) -> None:
        super().__init__(comm, workers.timeout)
        self.members, self._workers = list(members), workers

    def _until(
        self,
        done: Callable[[], bool],
        name: str,
        missing: Callable[[], list[int]],
        requests: Sequence[Any] = (),
    ) -> None:
        def look() -> bool:
            self._workers.listen()
            return done()

        super()._until(look, name, missing, requests)

    def _waited(self, name: str, ranks: list[int]) -> str:
        return (
            f"worker {self.members[self.rank]} waited {self.timeout:g} s in '{name}' for workers "
            f"{[self.members[rank] for rank in ranks]} of its node; see why they did not get "
            "there, or raise timeout= or EF_HOROVOD_TIMEOUT"
        )


class OfNode(Transport):
    """A worker that speaks to the servers for its node: rank and size count nodes.

    Args:
        members: the workers with the same slice, one of each node.
        workers: this worker's transport to the servers.
    """

    def __init__(self, members: Sequence[int], workers: ServerTransport) -> None:
        super().__init__(members.index(workers.rank), len(members), workers.timeout)
        self.members, self._workers = list(members), workers

    @property
    def has_server(self) -> bool:
        return True

    def open_bucket(self, name: str, length: int, method: str, seed: int) -> None:
        """Does nothing: all workers have opened all slices."""

    def ask(self, name: str, payload: np.ndarray, step: int) -> Callable[[], list[Answer]]:
        finish = self._counted(lambda: self._workers.ask(name, payload, step))
        return lambda: self._counted(finish)

    def dense_nbytes(self, nbytes: int) -> int:
        return self._workers.dense_nbytes(nbytes)

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        raise self._by_servers_only(name)

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        raise self._by_servers_only(name)

    def _counted(self, action: Callable[[], T]) -> T:
        sent, received = self._workers.bytes_sent, self._workers.bytes_received
        result = action()
        self.bytes_sent += self._workers.bytes_sent - sent
        self.bytes_received += self._workers.bytes_received - received
        return result

    def _by_servers_only(self, name: str) -> UnsupportedError:
        return UnsupportedError(
            f"got a collective '{name}' between nodes in a job with servers, expected "
            "messages to the servers only; take the transport of all workers"
        )
