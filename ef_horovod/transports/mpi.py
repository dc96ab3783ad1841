"""Ranks of an MPI job, by mpi4py: point-to-point messages on a communicator of its own.

Messages are matched by a tag that is made from the collective's name, so ranks may start
collectives in any order, and a rank that is missing can be named, which MPI's own collectives do
not allow. Sums are computed while they are waited for: wait for them in the same order everywhere.
Only uint8 buffers and float32/float64 numbers travel.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ef_horovod import _openmpi
from ef_horovod._extras import explained
from ef_horovod.arrays import Array
from ef_horovod.transports.base import Measure, Transport, require_summable
from ef_horovod.transports.waiting import limit_of, wait_until

_openmpi.set_prefix()  # importing MPI initialises it
with explained("ef_horovod.transports.mpi"):
    from mpi4py import MPI

_MAX_TAG = (1 << 30) - 1


class MPITransport(Transport):
    """All ranks of a communicator.

    Creating it is collective: all ranks of `comm` make theirs at the same point.

    Args:
        comm: duplicated, so that nobody else's messages can be mistaken for ours.
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.
    """

    def __init__(self, comm: Any = None, timeout: float | None = None) -> None:
        self._comm = (comm or MPI.COMM_WORLD).Dup()
        super().__init__(self._comm.Get_rank(), self._comm.Get_size(), limit_of(timeout))
        self._names: dict[int, str] = {}
        self._under_way: set[str] = set()

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        finish = self._exchange(name, [data] * self.size)

        def count() -> list[np.ndarray]:
            gathered = finish()
            self._count_allgather([part.size for part in gathered])
            return gathered

        return count

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        finish = self._exchange(name, parts)

        def count() -> list[np.ndarray]:
            received = finish()
            self._count_alltoall(parts, received)
            return received

        return count

    def _exchange(self, name: str, outgoing: Sequence[np.ndarray]) -> Callable[[], list[Any]]:
        """Send each rank its buffer; what comes from all of them, in rank order."""
        tag = self._begin(name)
        sends = [self._comm.Isend([outgoing[i], MPI.BYTE], i, tag) for i in self._peers()]

        def finish() -> list[np.ndarray]:
            parts = self._receive_from_all(name, tag)
            self._complete(name, sends)
            parts[self.rank] = outgoing[self.rank]
            self._under_way.discard(name)
            return [parts[rank] for rank in range(self.size)]

        return finish

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        """As in the base class; the sum is computed while it is waited for, by a ring."""
        require_summable(values)
        tag = self._begin(name)

        def finish() -> Array:
            view = np.asarray(values)
            if self.size > 1:
                self._ring(name, tag, view)
            self._count_allreduce(view.nbytes)
            self._under_way.discard(name)
            return values

        return finish

    def _ring(self, name: str, tag: int, values: np.ndarray) -> None:
        """Reduce-scatter, then allgather, in n - 1 steps each (Patarasu and Yuan 2009).

        Each slice is summed along the ring once and then copied, so all ranks get the same bits.
        """
        slices = np.array_split(values, self.size)
        incoming = np.empty_like(slices[0])
        for step in range(2 * (self.size - 1)):
            outgoing = slices[(self.rank - step) % self.size]
            target = slices[(self.rank - step - 1) % self.size]
            received = incoming[: target.size]
            self._pass_on(name, tag, outgoing, received)
            if step < self.size - 1:
                target += received
            else:
                target[:] = received

    def _pass_on(self, name: str, tag: int, outgoing: np.ndarray, incoming: np.ndarray) -> None:
        left, right = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        receive = self._comm.Irecv([incoming, MPI.BYTE], left, tag)
        send = self._comm.Isend([outgoing, MPI.BYTE], right, tag)
        wait_until(
            lambda: bool(MPI.Request.Testall([receive, send])),
            self.timeout,
            lambda: self._waited(name, [left] if not receive.Test() else [right]),
        )

    def _receive_from_all(self, name: str, tag: int) -> dict[int, np.ndarray]:
        missing = set(self._peers())
        parts: dict[int, np.ndarray] = {}

        def all_here() -> bool:
            for peer in sorted(missing):
                status = MPI.Status()
                message = self._comm.Improbe(peer, tag, status)
                if message is not None:
                    parts[peer] = np.empty(status.Get_count(MPI.BYTE), np.uint8)
                    message.Recv([parts[peer], MPI.BYTE])
                    missing.discard(peer)
            return not missing

        wait_until(all_here, self.timeout, lambda: self._waited(name, sorted(missing)))
        return parts

    def _complete(self, name: str, sends: list[Any]) -> None:
        wait_until(
            lambda: bool(MPI.Request.Testall(sends)),
            self.timeout,
            lambda: self._waited(name, self._peers()),
        )

    def _peers(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _begin(self, name: str) -> int:
        if name in self._under_way:
            raise ValueError(
                f"rank {self.rank} started '{name}' twice, expected once until it is waited for; "
                "give every collective in flight a name of its own"
            )
        tag = zlib.crc32(name.encode()) & _MAX_TAG
        if self._names.setdefault(tag, name) != name:
            raise ValueError(
                f"the names '{name}' and '{self._names[tag]}' share a tag; rename one of them"
            )
        self._under_way.add(name)
        return tag

    def _waited(self, name: str, ranks: list[int]) -> str:
        return (
            f"rank {self.rank} waited {self.timeout:g} s in '{name}' for ranks {ranks}; see why "
            "they did not get there, or raise timeout= or EF_HOROVOD_TIMEOUT"
        )
