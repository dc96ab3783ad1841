"""The interface of a transport, and how bytes are counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.arrays import Array, dtype_name, namespace
from ef_horovod.errors import PayloadError, UnsupportedError
from ef_horovod.transports.nodes import Levels
from ef_horovod.transports.timeouts.waiting import DEFAULT_TIMEOUT_SECONDS, require_limit

Measure = Callable[[np.ndarray], int]
Spans = Sequence[tuple[int, int]]  # start and stop of each rank's slice of a vector


def ring_share(nbytes: int, ranks: int) -> int:
    """Bytes that each rank sends in a bandwidth-optimal allreduce of `nbytes`, such as a ring."""
    return 2 * (ranks - 1) * nbytes // ranks


class Answer(NamedTuple):
    """A parameter server's answer to the messages of all workers."""

    payload: np.ndarray | None = None  # uint8[m], if the method compresses both ways
    numbers: np.ndarray | None = None  # float32[d], otherwise; valid until the next step
    counted: bool = True  # whether it includes this rank's own message

    @property
    def is_skip(self) -> bool:
        """Whether the answer is empty: all ranks drop the step."""
        return self.payload is None and self.numbers is None


class Transport(ABC):
    """Asynchronous collectives among `size` ranks.

    A collective is matched by its name. The name is equal on all ranks and serves one collective
    at a time. Each method returns a function that waits for the result. No wait is longer than
    `timeout`.

    Args:
        rank: of this process, from 0.
        size: number of ranks.
        timeout: limit of every wait, in seconds.
    """

    def __init__(self, rank: int, size: int, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self.rank, self.size, self.timeout = rank, size, require_limit(timeout)
        self.bytes_sent = 0  # by this rank, if the algorithms below ran over a network
        self.bytes_received = 0
        self.quorum: int | None = None  # workers per server round; None: all
        self.members: Sequence[int] = range(size)  # the ranks' numbers in the job, for messages

    @abstractmethod
    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        """Collect every rank's buffer.

        Args:
            name: of the collective.
            data: uint8[m], m >= 1; cheapest if m is the same in every step.
            measure: needed if lengths differ between ranks. It returns the length in bytes of the
                buffer at the start of its argument. Without it, all are as long as `data`.

        Returns:
            A function that waits and returns read-only uint8 arrays in rank order.
        """

    @abstractmethod
    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        """Sum over ranks.

        Args:
            name: of the collective.
            values: float32[m] or float64[m]; may be overwritten with the result.

        Returns:
            A function that waits and returns the sum, bitwise equal on all ranks.

        Raises:
            UnsupportedError: 16-bit or integer values; their sums overflow or are not defined.
            ConfigMismatchError: ranks have different lengths (Horovod raises its own error).
        """

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        """Send each rank a different buffer.

        Args:
            name: of the collective.
            parts: for each rank, in rank order, uint8[m_j] with m_j >= 1.
            measure: as for `allgather`. Without it, every received buffer is as long as this
                rank's own part.

        Returns:
            A function that waits and returns the received buffers: read-only uint8 arrays in rank
            order.

        Raises:
            UnsupportedError: this transport has no all-to-all.
        """
        raise UnsupportedError(
            f"got an all-to-all for {type(self).__name__}, expected a transport that has "
            "one, because slices need it; take MPI's, Horovod's or that of one process, or another "
            "exchange"
        )

    in_order = False  # True: matched by order, so all ranks must start collectives in the same one
    levels_known = True  # False: the next call of `levels` is collective
    fixed_collectives = False  # whether the collectives of a bucket are the same in all steps
    _levels: Levels | None = None
    _no_levels: UnsupportedError | None = None

    @property
    def who(self) -> str:
        """This rank, by its number in the job, for messages."""
        if self.members == range(self.size):
            return f"rank {self.rank} of {self.size}"
        return f"rank {self.members[self.rank]} among ranks {str(list(self.members))[:80]}"

    def levels(self) -> Levels | None:
        """The levels within a node and between nodes; collective unless `levels_known`.

        None with one node, with one rank on each, or if this transport knows no nodes.

        Raises:
            UnsupportedError: the groups of ranks cannot be made; with the way out.
        """
        if not self.levels_known:
            self.levels_known = True
            try:
                self._levels = self._open_levels()
            except UnsupportedError as error:
                self._no_levels = error
        if self._no_levels is not None:
            raise self._no_levels
        return self._levels

    @property
    def ranks_per_node(self) -> int:
        """Of several nodes with equally many ranks; 1 for others, or where it is not known yet.

        Equal on all ranks, and not collective.
        """
        return self._levels.slices if self._levels is not None else 1

    def _open_levels(self) -> Levels | None:
        """Make the groups of ranks; collective."""
        return None

    def reduce_scatter(self, name: str, values: Array, slices: Spans) -> Callable[[], Array]:
        """Sum over ranks, in rank order; each rank gets one slice of the sum.

        Args:
            name: of the collective.
            values: float32[d], the same length on all ranks; unchanged until the wait.
            slices: start and stop of each rank's slice.

        Returns:
            A function that waits and returns this rank's slice of the sum, float32.
        """
        xp, device = namespace(values), getattr(values, "device", None)
        whole = xp.to_host(values)
        parts = [_as_bytes(whole[start:stop]) for start, stop in slices]
        finish = self.alltoall(name, parts)

        def summed() -> Array:
            start, stop = slices[self.rank]
            first, *others = (part[: 4 * (stop - start)].view("<f4") for part in finish())
            total = first.copy()
            with np.errstate(over="ignore", invalid="ignore"):  # found later, in the sum
                for part in others:
                    total += part
            return xp.from_host(total, device)

        return summed

    def gather_slices(self, name: str, part: Array, slices: Spans) -> Callable[[], Array]:
        """Put together the slices of all ranks.

        Args:
            name: of the collective.
            part: float32[m], this rank's slice; unchanged until the wait.
            slices: start and stop of each rank's slice, one after the other.

        Returns:
            A function that waits and returns the whole vector, float32[d].
        """
        xp, device = namespace(part), getattr(part, "device", None)
        lengths = [4 * (stop - start) for start, stop in slices]
        left = iter([max(length, 1) for length in lengths])
        finish = self.allgather(name, _as_bytes(xp.to_host(part)), lambda _: next(left))

        def whole() -> Array:
            parts = [got[:length] for got, length in zip(finish(), lengths, strict=True)]
            return xp.from_host(np.concatenate(parts).view("<f4"), device)

        return whole

    @property
    def has_server(self) -> bool:
        """Whether the job has parameter servers, so that `open_bucket` and `ask` work."""
        return False

    def open_bucket(self, name: str, length: int, method: str, seed: int) -> None:
        """Announce a vector float32[length], before the first `ask` sends it."""
        raise self._without_server()

    def open_slices(
        self, name: Callable[[int], str], lengths: Sequence[int], method: str, seed: int
    ) -> None:
        """Announce a vector in slices, each sent by one rank of every node, as in `levels`.

        Args:
            name: of slice j's bucket.
            lengths: of the slices.
            method, seed: as for `open_bucket`.
        """
        raise self._without_server()

    def ask(self, name: str, payload: np.ndarray, step: int) -> Callable[[], list[Answer]]:
        """Send a bucket's payload, uint8[m], to its server.

        Returns:
            A function that waits and returns the server's answer. With a quorum, it returns the
            answers of all rounds up to the one that includes the payload.

        Raises:
            UnsupportedError: this transport has no server.
        """
        raise self._without_server()

    # Without servers, these three do nothing.

    def handshake(  # noqa: B027
        self, facts: Sequence[str] = (), step: int = 0, *, several_rounds: bool = False
    ) -> None:
        """Connect to the servers; see `ServerTransport.handshake`."""

    def save(self, step: int) -> None:  # noqa: B027
        """Let the servers write their error-feedback state after `step` steps; collective."""

    def require_not_begun(self) -> None:  # noqa: B027
        """Raise if training has begun: servers read their saved state only before the first step.

        Raises:
            UnsupportedError: the first step has begun.
        """

    def catch_up(self, names: Sequence[str]) -> list[list[Answer]]:
        """Answers of rounds that did not include this rank; see `ServerTransport.catch_up`."""
        raise self._without_server()

    def dense_nbytes(self, nbytes: int) -> int:
        """Bytes that this rank would send for `nbytes` of float32 without compression."""
        return ring_share(nbytes, self.size)

    def _without_server(self) -> UnsupportedError:
        return UnsupportedError(
            f"got exchange='server' with {type(self).__name__}, which knows ranks that train only, "
            "expected a job with a parameter server; see `launch/server --help`"
        )

    def barrier(self, name: str) -> None:
        """Wait until all ranks have called this."""
        self.allgather(name, np.zeros(1, np.uint8))()

    def _count_allgather(self, nbytes_each: list[int]) -> None:
        """Count an all-gather: every rank sends its buffer to every other rank."""
        own = nbytes_each[self.rank]
        self.bytes_sent += own * (self.size - 1)
        self.bytes_received += sum(nbytes_each) - own

    def _count_alltoall(self, sent: Sequence[np.ndarray], received: Sequence[np.ndarray]) -> None:
        """Count an all-to-all; a rank's part for itself is not sent."""
        self.bytes_sent += sum(part.size for part in sent) - sent[self.rank].size
        self.bytes_received += sum(part.size for part in received) - received[self.rank].size

    def _count_allreduce(self, nbytes: int) -> None:
        share = ring_share(nbytes, self.size)
        self.bytes_sent += share
        self.bytes_received += share


def split(
    name: str, gathered: np.ndarray, own: int, size: int, measure: Measure | None
) -> list[np.ndarray]:
    """Cut concatenated buffers into one uint8 array per rank.

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


def _as_bytes(values: np.ndarray) -> np.ndarray:
    """float32[m] as uint8, with a byte for an empty one."""
    data = np.ascontiguousarray(values, "<f4").view(np.uint8)
    return data if data.size else np.zeros(1, np.uint8)
