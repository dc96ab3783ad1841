"""Messages on their way in and out of a server: non-blocking, into memory that is there before.

A message is looked at before it is received: a matched probe tells who sent it, about which bucket
and how long it is. So one that is too long, or that nobody waits for, is refused and not cut off or
written over another one that is still needed, as a receive that was posted before would do.
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
    """A message in full, or why it is none."""

    source: int  # rank in the communicator
    tag: int
    message: Message | None
    body: np.ndarray  # uint8[m], in the buffer that was given for it
    problem: str  # empty if it is sound


class Inbox:
    """Receives from anyone, sends to anyone.

    Args:
        comm: private communicator.
        buffer_of: (source, tag, bytes) to uint8 of at least so many bytes for the message, or None
            if nobody waits for one there.
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
        """What has arrived since the last call; also moves on what is being sent."""
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
        """Whether nothing is on its way out."""
        self._drop_sent()
        return not self._sends

    def has_left(self, tag: int) -> bool:
        """Whether nothing with this tag is on its way out."""
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
            room = np.empty(nbytes, np.uint8)  # it has to go somewhere
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
    """Room for a message that is not about a bucket."""
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
