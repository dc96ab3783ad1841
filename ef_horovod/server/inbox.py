"""Messages to and from a server: non-blocking, received into preallocated memory.

A matched probe shows each message's sender, bucket and length before it is received. So a message
that is too long or unexpected is refused. A receive posted in advance would cut it off, or write it
over another message that is still needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ef_horovod.errors import ProtocolError
from ef_horovod.server.protocol import Message, unpack

_LONGEST_CONTROL_NBYTES = 1 << 26


class Arrived(NamedTuple):
    """A complete message, or the problem with it."""

    source: int  # rank in the communicator
    tag: int
    message: Message | None
    body: np.ndarray  # uint8[m], in the buffer provided for it
    problem: str  # empty if the message is valid


class Inbox:
    """Receives from anyone, sends to anyone.

    Args:
        comm: private communicator.
        buffer_of: maps (source, tag, bytes) to a uint8 buffer of at least that size, or None if no
            such message is expected.
    """

    def __init__(self, comm: Any, buffer_of: Callable[[int, int, int], np.ndarray | None]) -> None:
        self._comm, self._buffer_of = comm, buffer_of
        self._receives: list[Any] = []
        self._expected: list[tuple[int, int, np.ndarray, bool]] = []
        self._sends: list[tuple[Any, np.ndarray, int]] = []  # request, what is sent, tag
        self._statuses: list[Any] = []
        self.bytes_received = 0
        self.bytes_sent = 0

    def poll(self) -> list[Arrived]:
        """Messages that arrived since the last call; also makes progress on sends."""
        while self._probe():
            pass
        arrived = list(self._received())
        self._drop_sent()
        return arrived

    def send(self, data: np.ndarray, ranks: list[int], tag: int) -> None:
        """Send uint8[m] to some ranks; it must not change before `has_left(tag)`."""
        for rank in ranks:
            self._sends.append((self._comm.Isend([data, MPI.BYTE], rank, tag), data, tag))
            self.bytes_sent += data.size

    @property
    def sent(self) -> bool:
        """Whether no send is pending."""
        self._drop_sent()
        return not self._sends

    def has_left(self, tag: int) -> bool:
        """Whether no send with this tag is pending."""
        self._drop_sent()
        return all(other != tag for _, _, other in self._sends)

    def _probe(self) -> bool:
        status = MPI.Status()
        handle = self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)
        if handle is None:
            return False
        source, tag, nbytes = status.Get_source(), status.Get_tag(), status.Get_count(MPI.BYTE)
        room = self._buffer_of(source, tag, nbytes)
        wanted = room is not None and room.size >= nbytes
        if room is None or room.size < nbytes:
            room = np.empty(nbytes, np.uint8)  # it must be received anyway
        room = room[:nbytes]
        self._receives.append(handle.Irecv([room, MPI.BYTE]))
        self._expected.append((source, tag, room, wanted))
        return True

    def _received(self) -> Iterator[Arrived]:
        done = MPI.Request.Testsome(self._receives) if self._receives else None
        for place in sorted(done or ()):  # in the order of arrival
            source, tag, room, wanted = self._expected[place]
            self.bytes_received += room.size
            yield _read(source, tag, room, wanted)
        for place in sorted(done or (), reverse=True):
            del self._receives[place], self._expected[place]

    def _drop_sent(self) -> None:
        self._sends = [one for one in self._sends if not one[0].Test()]


def control_buffer(nbytes: int) -> np.ndarray | None:
    """A buffer for a message that is not about a bucket."""
    return np.empty(nbytes, np.uint8) if nbytes <= _LONGEST_CONTROL_NBYTES else None


def _read(source: int, tag: int, room: np.ndarray, wanted: bool) -> Arrived:
    if not wanted:
        problem = (
            f"got {room.size} bytes with tag {tag}, expected nothing there, or less; another "
            "config, a message sent twice, or somebody else who uses this communicator"
        )
        return Arrived(source, tag, None, room, problem)
    try:
        message, body = unpack(room)
    except ProtocolError as error:
        return Arrived(source, tag, None, room, str(error))
    return Arrived(source, tag, message, body, "")
