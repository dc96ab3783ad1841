"""What every transport offers, and how bytes are counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.arrays import Array, dtype_name
from ef_horovod.errors import PayloadError, UnsupportedError
from ef_horovod.transports.timeouts.waiting import DEFAULT_TIMEOUT_SECONDS, require_limit

Measure = Callable[[np.ndarray], int]


def ring_share(nbytes: int, ranks: int) -> int:
    """Bytes that each rank sends to sum `nbytes` by a ring, or another bandwidth-optimal way."""
    return 2 * (ranks - 1) * nbytes // ranks


class Answer(NamedTuple):
    """What a parameter server makes of the messages of all workers."""

    payload: np.ndarray | None = None  # uint8[m], of methods that compress both ways
    numbers: np.ndarray | None = None  # float32[d], of all others; valid until the next step
    counted: bool = True  # whether this rank's own message is in it

    @property
    def is_skip(self) -> bool:
        """Whether there is nothing: the step is dropped on all ranks."""
        return self.payload is None and self.numbers is None


class Transport(ABC):
    """Collectives among `size` ranks, started at once and waited for later.

    A collective is matched by its name: equal on all ranks, used for one collective at a time.
    Each method returns a function that waits for the result. No wait is longer than `timeout`.

    Args:
        rank: of this process, from 0.
        size: number of ranks.
        timeout: limit of every wait, in seconds.
    """

    def __init__(self, rank: int, size: int, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self.rank, self.size, self.timeout = rank, size, require_limit(timeout)
        self.bytes_sent = 0  # by this rank, as the algorithms below would put on a network
        self.bytes_received = 0
        self.quorum: int | None = None  # how many workers make a server's round, if not all do

    @abstractmethod
    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        """Collect every rank's buffer.

        Args:
            name: of the collective.
            data: uint8[m], m >= 1; cheapest when m is the same at every step.
            measure: for buffers whose lengths differ between ranks: tells how many bytes the one
                at the start of its argument takes. Without it, all are as long as `data`.

        Returns:
            A function that waits and gives uint8 arrays in rank order, to read only.
        """

    @abstractmethod
    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        """Sum over ranks.

        Args:
            name: of the collective.
            values: float32[m] or float64[m]; may be overwritten with the result.

        Returns:
            A function that waits and gives the sum, equal to the last bit on all ranks.

        Raises:
            UnsupportedError: 16-bit or integer values, whose sums overflow or are not defined.
            ConfigMismatchError: ranks have different lengths (with Horovod an error of its own).
        """

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        """Send every rank a buffer of its own.

        Args:
            name: of the collective.
            parts: for each rank, in rank order, uint8[m_j] with m_j >= 1.
            measure: as for `allgather`; without it, what all ranks send to this one is as long as
                what it has for itself.

        Returns:
            A function that waits and gives what the ranks sent to this one, uint8 arrays in rank
            order, to read only.

        Raises:
            UnsupportedError: this transport cannot.
        """
        raise UnsupportedError(
            f"got an all-to-all for {type(self).__name__}, expected a transport that has one, for "
            "slices to travel by; take MPI's, Horovod's or that of one process, or another exchange"
        )

    @property
    def has_server(self) -> bool:
        """Whether `open_bucket` and `ask` work: there are parameter servers, not only peers."""
        return False

    def open_bucket(self, name: str, length: int, method: str, seed: int) -> None:
        """Announce a vector float32[length] that `ask` will send, before the first `ask`."""
        raise self._without_server()

    def ask(self, name: str, payload: np.ndarray, step: int) -> Callable[[], list[Answer]]:
        """Send a bucket's payload, uint8[m], to its server.

        Returns:
            A function that waits and gives the server's answer. Where rounds do not wait for all
            workers, these are the answers of all rounds up to the one in which the payload counts.

        Raises:
            UnsupportedError: this transport knows no server.
        """
        raise self._without_server()

    # Without servers there is nothing to do in these three.

    def handshake(  # noqa: B027
        self, facts: Sequence[str] = (), step: int = 0, *, several_rounds: bool = False
    ) -> None:
        """Meet the servers; see `ServerTransport.handshake`."""

    def save(self, step: int) -> None:  # noqa: B027
        """Have the servers write their memories after so many steps; collective."""

    def require_not_begun(self) -> None:  # noqa: B027
        """Raise if memories of another step come too late: servers read theirs before the first.

        Raises:
            UnsupportedError: always there.
        """

    def catch_up(self, names: Sequence[str]) -> list[list[Answer]]:
        """Answers of rounds that went by without this rank; see `ServerTransport.catch_up`."""
        raise self._without_server()

    def dense_nbytes(self, nbytes: int) -> int:
        """What this rank would send in place of `nbytes` of float32, without compression."""
        return ring_share(nbytes, self.size)

    def _without_server(self) -> UnsupportedError:
        return UnsupportedError(
            f"got exchange='server' with {type(self).__name__}, which knows ranks that train only, "
            "expected a job with a parameter server; see `launch/server --help`"
        )

    def barrier(self, name: str) -> None:
        """Wait until all ranks are here."""
        self.allgather(name, np.zeros(1, np.uint8))()

    def _count_allgather(self, nbytes_each: list[int]) -> None:
        """Every rank's buffer has to reach every other rank."""
        own = nbytes_each[self.rank]
        self.bytes_sent += own * (self.size - 1)
        self.bytes_received += sum(nbytes_each) - own

    def _count_alltoall(self, sent: Sequence[np.ndarray], received: Sequence[np.ndarray]) -> None:
        """What a rank has for itself stays where it is."""
        self.bytes_sent += sum(part.size for part in sent) - sent[self.rank].size
        self.bytes_received += sum(part.size for part in received) - received[self.rank].size

    def _count_allreduce(self, nbytes: int) -> None:
        share = ring_share(nbytes, self.size)
        self.bytes_sent += share
        self.bytes_received += share


def split(
    name: str, gathered: np.ndarray, own: int, size: int, measure: Measure | None
) -> list[np.ndarray]:
    """Each rank's buffer, uint8, from all of them one behind the other.

    Args:
        name: of the collective, for messages.
        gathered: uint8[sum of lengths].
        own: length of this rank's buffer for this rank.
        size: number of ranks.
        measure: see `Transport.allgather`.

    Raises:
        PayloadError: the parts do not add up.
    """
    lengths, position = [], 0
    for _ in range(size):
        lengths.append(own if measure is None else measure(gathered[position:]))
        position += lengths[-1]
    if position != gathered.size:
        raise PayloadError(
            f"'{name}' brought {gathered.size} bytes from {size} ranks, expected {position}; "
            "use the same config on all ranks"
        )
    return np.split(gathered, np.cumsum(lengths)[:-1])


def require_summable(values: Any) -> None:
    """Raise unless an array may be summed over ranks: float32 or float64."""
    if dtype_name(values) not in ("float32", "float64"):
        raise UnsupportedError(
            f"got {values.dtype} values to sum, expected float32 or float64: MPI adds 16-bit "
            "floats wrongly or not at all; convert them first, or gather them as bytes"
        )
