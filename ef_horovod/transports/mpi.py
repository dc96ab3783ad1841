"""Transport over mpi4py: point-to-point messages on a duplicated communicator.

Messages are matched by the collective's name. So ranks may start collectives in any order, and
errors can name a missing rank; MPI's own collectives allow neither. Each rank numbers the names
that it uses and sends each name to the others at its first use. The number is the MPI tag, so no
two names share a tag, and tags stay small. Sums are computed during the wait: wait for them in the
same order on all ranks. Only uint8 buffers and float32/float64 numbers travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.common import openmpi
from ef_horovod.common.extras import explained
from ef_horovod.errors import CollectiveTimeoutError, ConfigMismatchError, UnsupportedError
from ef_horovod.transports.base import Measure, Transport, require_summable
from ef_horovod.transports.nodes import Levels, groups_of
from ef_horovod.transports.timeouts.waiting import limit_of, wait_until

openmpi.set_prefix()  # importing MPI initialises it
with explained("ef_horovod.transports.mpi"):
    from mpi4py import MPI

_NAMES = 0  # tag of the messages that carry names; the first name gets tag 1, and so on
# Open MPI 4 loses messages of 2^31 bytes and more. Longer buffers travel in pieces. The last piece
# is always shorter than this; it may be empty.
PIECE_NBYTES = 1 << 30
_given_up: list[Any] = []  # requests that timed out; MPI may still use their memory


def largest_tag() -> int:
    """MPI's largest tag, which may be as small as 32,767."""
    tag: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    return int(tag)


def communicator(comm: Any) -> Any:
    """`comm`, or COMM_WORLD for None.

    Raises:
        ValueError: `comm` is MPI.COMM_NULL.
    """
    if comm is None:
        return MPI.COMM_WORLD
    if comm == MPI.COMM_NULL:
        raise ValueError(
            "got MPI.COMM_NULL, expected a communicator that this rank belongs to; leave out the "
            "ranks that do not"
        )
    return comm


class MPITransport(Transport):
    """All ranks of a communicator.

    Creating it is collective over `comm`.

    Args:
        comm: default COMM_WORLD. It is duplicated, so that other messages cannot interfere.
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.
    """

    levels_known = False

    def __init__(self, comm: Any = None, timeout: float | None = None) -> None:
        limit = limit_of(timeout)
        self._comm = communicator(comm).Dup()
        super().__init__(self._comm.Get_rank(), self._comm.Get_size(), limit)
        self._tags: dict[str, int] = {}  # by name, for this rank's messages
        self._tags_of: list[dict[str, int]] = [{} for _ in range(self.size)]  # the other ranks'
        self._told: list[tuple[Any, np.ndarray]] = []  # names still being sent
        self._under_way: set[str] = set()
        self._late: dict[str, str] = {}  # names that timed out, with the error's text

    def _open_levels(self) -> Levels | None:
        groups = groups_of(self._first_ranks())
        if groups is None:
            return None
        within, cross = (self._within(level) for level in groups)
        assert within is not None
        return Levels(within, cross, len(groups.cross), self.size / len(groups.nodes))

    def _first_ranks(self) -> list[int]:
        """Of each rank: the first rank on its node."""
        shared = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        first: list[int] = self._comm.allgather(shared.bcast(self.rank))
        shared.Free()
        return first

    def _within(self, level: list[list[int]]) -> MPITransport | None:
        """This rank's transport in one level; None if it is in none of its groups."""
        own = next((i for i, group in enumerate(level) if self.rank in group), None)
        comm = self._comm.Split(MPI.UNDEFINED if own is None else own, self.rank)
        if own is None:
            return None
        transport = MPITransport(comm, self.timeout)  # which duplicates it
        comm.Free()
        transport.members = [self.members[rank] for rank in level[own]]
        return transport

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
        """Send each rank its buffer; the returned function waits for theirs, in rank order."""
        tag = self._begin(name)
        requests = [
            self._comm.Isend([piece, MPI.BYTE], peer, tag)
            for peer in self._peers()
            for piece in _pieces(outgoing[peer])
        ]
        sends = list(requests)

        def finish() -> list[np.ndarray]:
            parts = self._receive_from_all(name, requests)
            self._until(lambda: bool(MPI.Request.Testall(sends)), name, self._peers, requests)
            parts[self.rank] = outgoing[self.rank]
            self._under_way.discard(name)
            return [parts[rank] for rank in range(self.size)]

        return finish

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        """As in the base class; a ring computes the sum during the wait."""
        require_summable(values)
        self._begin(name)

        def finish() -> Array:
            view = np.asarray(values)
            if self.size > 1:
                most = self.size * PIECE_NBYTES // view.itemsize
                for begin in range(0, max(view.size, 1), most):
                    self._ring(name, view[begin : begin + most])
            self._count_allreduce(view.nbytes)
            self._under_way.discard(name)
            return values

        return finish

    def _ring(self, name: str, values: np.ndarray) -> None:
        """Reduce-scatter, then allgather, in n - 1 steps each (Patarasuk and Yuan 2009).

        Each slice is summed once along the ring and then copied, so all ranks get the same bits.
        """
        slices = np.array_split(values, self.size)
        incoming = np.empty_like(slices[0])
        for step in range(2 * (self.size - 1)):
            outgoing = slices[(self.rank - step) % self.size]
            target = slices[(self.rank - step - 1) % self.size]
            received = incoming[: target.size]
            self._pass_on(name, outgoing, received)
            if step < self.size - 1:
                target += received
            else:
                target[:] = received

    def _pass_on(self, name: str, outgoing: np.ndarray, incoming: np.ndarray) -> None:
        left, right = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        requests = [self._comm.Isend([outgoing, MPI.BYTE], right, self._tags[name])]

        def is_through() -> bool:
            if len(requests) == 1:
                found = self._probe(left, name)
                if found is None:
                    return False
                message, nbytes = found
                if nbytes != incoming.nbytes:
                    _given_up.extend(requests)
                    raise ConfigMismatchError(
                        f"rank {left} sends {nbytes} bytes of the sum '{name}' where rank "
                        f"{self.rank} has {incoming.nbytes}, expected the same; sum arrays that "
                        "have one length on all ranks"
                    )
                requests.append(message.Irecv([incoming, MPI.BYTE]))
            return bool(MPI.Request.Testall(requests))

        self._until(
            is_through,
            name,
            lambda: [right] if len(requests) == 2 and requests[1].Test() else [left],
            requests,
        )

    def _receive_from_all(self, name: str, requests: list[Any]) -> dict[int, np.ndarray]:
        """Every other rank's buffer; adds its receive requests to `requests`."""
        missing = set(self._peers())
        pieces: dict[int, list[np.ndarray]] = {peer: [] for peer in missing}
        receives: dict[int, Any] = {}  # requests of the pieces being received

        def is_here(peer: int) -> bool:
            while True:
                if peer not in receives:
                    found = self._probe(peer, name)
                    if found is None:
                        return False
                    message, nbytes = found
                    pieces[peer].append(np.empty(nbytes, np.uint8))
                    # Not blocking: the timeout must notice a rank that stops in the middle.
                    receives[peer] = message.Irecv([pieces[peer][-1], MPI.BYTE])
                    requests.append(receives[peer])
                if not receives[peer].Test():
                    return False
                if pieces[peer][-1].size < PIECE_NBYTES:
                    return True
                del receives[peer]

        def all_here() -> bool:
            missing.difference_update([peer for peer in missing if is_here(peer)])
            return not missing

        self._until(all_here, name, lambda: sorted(missing), requests)
        return {
            peer: parts[0] if len(parts) == 1 else np.concatenate(parts)
            for peer, parts in pieces.items()
        }

    def _until(
        self,
        done: Callable[[], bool],
        name: str,
        missing: Callable[[], list[int]],
        requests: Sequence[Any] = (),
    ) -> None:
        """Wait; after the timeout give up the collective, whose messages may still arrive."""
        try:
            wait_until(done, self.timeout, lambda: self._waited(name, missing()))
        except CollectiveTimeoutError as error:
            self._late[name] = str(error)
            _given_up.extend(requests)
            raise

    def _peers(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _begin(self, name: str) -> int:
        if name in self._late:
            raise CollectiveTimeoutError(self._late[name])
        if name in self._under_way:
            raise ValueError(
                f"rank {self.rank} started '{name}' twice, expected once until it is waited for; "
                "give every collective in flight a different name"
            )
        if name not in self._tags:
            self._tell(name)
        self._under_way.add(name)
        return self._tags[name]

    def _tell(self, name: str) -> None:
        """Give a name the next tag, and send the name to all other ranks."""
        if len(self._tags) >= largest_tag():
            raise UnsupportedError(
                f"got '{name}' as name number {len(self._tags) + 1} of a collective, expected at "
                f"most {largest_tag()}, MPI's largest tag here; use the same names in all steps"
            )
        self._tags[name] = len(self._tags) + 1
        text = np.frombuffer(name.encode(), np.uint8)
        self._told = [(request, text) for request, text in self._told if not request.Test()]
        for peer in self._peers():
            self._told.append((self._comm.Isend([text, MPI.BYTE], peer, _NAMES), text))

    def _probe(self, peer: int, name: str) -> tuple[Any, int] | None:
        """A rank's next message under a name, and its length in bytes; None if none is here."""
        tag, status = self._tag_of(peer, name), MPI.Status()
        message = None if tag is None else self._comm.Improbe(peer, tag, status)
        return None if message is None else (message, status.Get_count(MPI.BYTE))

    def _tag_of(self, peer: int, name: str) -> int | None:
        """The tag of a rank's messages under a name; None if the rank has not used it yet."""
        known, status = self._tags_of[peer], MPI.Status()
        while name not in known:
            message = self._comm.Improbe(peer, _NAMES, status)
            if message is None:
                return None
            text = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            message.Recv([text, MPI.BYTE])
            known[text.tobytes().decode()] = len(known) + 1
        return known[name]

    def _waited(self, name: str, ranks: list[int]) -> str:
        return (
            f"rank {self.members[self.rank]} waited {self.timeout:g} s in '{name}' for ranks "
            f"{[self.members[rank] for rank in ranks]}; see why they did not get there, or raise "
            "timeout= or EF_HOROVOD_TIMEOUT"
        )


def _pieces(data: np.ndarray) -> list[np.ndarray]:
    return [data[i : i + PIECE_NBYTES] for i in range(0, data.size + 1, PIECE_NBYTES)]
